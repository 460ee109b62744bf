"""What ScienceWorld's answers mean: not understood, refused, a question back.

Takes texts of the engine (1.2), gives facts about them; knows no world.
"""

import re
from collections.abc import Sequence

UNKNOWN = ("No known action matches that input", "Unknown action.")
AMBIGUOUS = "Ambiguous request:"
QUESTION = f"{AMBIGUOUS} Please enter the number for the action you intended (or blank to cancel):"
_REFUSED = re.compile(
    r"already (?:open|closed|activated|deactivated|flushing|connected|appears to be)"
    r"|is not (?:something that can be|closeable|openable|edible|moveable|a container|open\b)"
    r"|(?:isn't|it's not|is in is not|that's not) (?:open|movable|moveable|a container)"
    r"|It'?s not clear how|I'm not sure|doesn't appear to|does not appear to|appears broken"
    r"|no items to mix"
    r"|You can't |can't be moved|can't be poured|can't be connected|aren't able to move"
    r"|is empty, so there's nothing|does not contain any liquids|must specify specific points"
    r"|You must disconnect|The door is not open|^ERROR|^<ERROR"
)
"""Refusals of the engine's action rules: understood, and nothing happened."""
_CHOICE = re.compile(r"^(\d+):\t(.+)$", re.M)
LOOKS = ("look around", "look at ", "look in ", "examine ", "inventory", "task", "read ", "look")
"""Actions that only show something."""


def not_understood(observation: str) -> bool:
    """The engine found no action in the input."""
    return observation.startswith(UNKNOWN)


def is_noop(observation: str) -> bool:
    """The action was not understood or could not be carried out."""
    return not_understood(observation) or bool(_REFUSED.search(observation.split("\n", 1)[0]))


def choices(observation: str) -> list[str]:
    """What an ambiguous-request prompt offers, by number; empty for any other text."""
    if not observation.startswith(AMBIGUOUS):
        return []
    return [match[2].strip() for match in _CHOICE.finditer(observation)]


def question(offers: Sequence[str]) -> str:
    """The prompt with these offers; the engine's own order differs from run to run."""
    return "\n".join([QUESTION, *(f"{n}:\t{offer}" for n, offer in enumerate(offers))])


def is_look(action: str) -> bool:
    """The action only shows something; the world stays as it is but for the time."""
    return action.startswith(LOOKS) and not action.startswith("look through")
