"""The texts of the ALFRED text domain, and the few of them that a game file may word otherwise.

Takes the grammar part of a game file; gives its goal sentence and a `Wording`. Every other text is
a constant here; a full grammar without them is refused, never played with other words.
Names in templates: {o} object, {r} receptacle, {l} location, {k} knife.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from step_ray.errors import DataError

WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
NOTHING_HAPPENS = "Nothing happens."
GOAL_PREFIX = "Your task is to: "

IN_THE_MIDDLE = "You are in the middle of a room. Looking quickly around you, you see "
FACING = "You are facing the "
NEXT_TO_IT = ". Next to it, you see "
OPEN_RECEPTACLE = "The {r} is open. In it, you see "
CLOSED_RECEPTACLE = "The {r} is closed."
ON_RECEPTACLE = "On the {r}, you see "
RECEPTACLE_OBJECT = "This is a normal {o}. In it, you see "
CARRYING = "You are carrying: "
EMPTY_HANDS = "You are not carrying anything."
OPEN = "You open the {r}. "
CLOSE = "You close the {r}."
TAKE = "You pick up the {o} from the {r}."
USE = "You turn on the {o}."
HEAT = "You heat the {o} using the {r}."
CLEAN = "You clean the {o} using the {r}."
COOL = "You cool the {o} using the {r}."
SLICE = "You sliced the {o} with the {k}."

OBJECT_TEXTS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"isclean", "ishot", "issliced"}), "This is a hot and clean sliced {o}."),
    (frozenset({"isclean", "iscool", "issliced"}), "This is a cool and clean sliced {o}."),
    (frozenset({"isclean", "issliced"}), "This is a clean sliced {o}."),
    (frozenset({"ishot", "issliced"}), "This is a hot sliced {o}."),
    (frozenset({"iscool", "issliced"}), "This is a cool sliced {o}."),
    (frozenset({"isclean", "ishot"}), "This is a hot and clean {o}."),
    (frozenset({"isclean", "iscool"}), "This is a cool and clean {o}."),
    (frozenset({"ishot"}), "This is a hot {o}."),
    (frozenset({"isclean"}), "This is a clean {o}."),
    (frozenset({"iscool"}), "This is a cold {o}."),
    (frozenset({"toggleable", "istoggled"}), "This {o} is on."),
    (frozenset({"sliceable", "issliced"}), "This is a sliced {o}."),
    (frozenset(), "There's nothing special about {o}."),
)
"""What `examine` says of an object that is no container: the first row whose facts all hold."""

_FIXED_TEXTS = (
    *(WELCOME, IN_THE_MIDDLE, FACING, NEXT_TO_IT, OPEN_RECEPTACLE, CLOSED_RECEPTACLE),
    *(ON_RECEPTACLE, RECEPTACLE_OBJECT, CARRYING, EMPTY_HANDS, OPEN, CLOSE, TAKE),
    *(USE, HEAT, CLEAN, COOL, SLICE, *(template for _, template in OBJECT_TEXTS)),
)

_HELP_ROWS = (
    ("look", "look around your current location"),
    ("inventory", "check your current inventory"),
    ("go to (receptacle)", "move to a receptacle"),
    ("open (receptacle)", "open a receptacle"),
    ("close (receptacle)", "close a receptacle"),
    ("take (object) from (receptacle)", "take an object from a receptacle"),
    ("move (object) to (receptacle)", "place an object in or on a receptacle"),
    ("examine (something)", "examine a receptacle or an object"),
    ("use (object)", "use an object"),
    ("heat (object) with (receptacle)", "heat an object using a receptacle"),
    ("clean (object) with (receptacle)", "clean an object using a receptacle"),
    ("cool (object) with (receptacle)", "cool an object using a receptacle"),
    ("slice (object) with (object)", "slice an object using a sharp object"),
)


def _help_text() -> str:
    # The 'move' row is two columns short in the official text.
    widths = {"move (object) to (receptacle)": 32}
    rows = (f"  {what + ':':<{widths.get(what, 34)}}{does}" for what, does in _HELP_ROWS)
    return "Available commands:\n" + "\n".join(rows) + "\n"


@dataclass(frozen=True, slots=True)
class Wording:
    """The texts that differ between releases of the game files."""

    put_command: str = "move {o} to {r}"
    put: str = "You move the {o} to the {r}."
    arrive: str = "You arrive at {r}. "
    help: str | None = _help_text()
    """Answer to `help`; None where the domain has no such action."""


def respell(command: str, wording: Wording) -> str:
    """Spell a put/move command as the game's own grammar does; others stay as they are.

    Published game files carry walkthroughs of an older release than their grammar.
    """
    put = re.fullmatch(r"(?:put|move) (.+?) (?:in/on|to) (.+)", command)
    return wording.put_command.format(o=put[1], r=put[2]) if put else command


def join_list(items: Iterable[str]) -> str:
    """Enumerate as the official engine does: 'nothing', 'a', 'a, and b', 'a, b, and c'."""
    names = list(items)
    if len(names) < 2:
        return names[0] if names else "nothing"
    return ", ".join(names[:-1]) + ", and " + names[-1]


def read_goal(grammar: str) -> str:
    """Return the goal sentence 'Your task is to: ...' of a grammar (or of a bare task line)."""
    quoted = re.search(rf'"({GOAL_PREFIX}(?:[^"\\]|\\.)*)"', grammar)
    if quoted:
        return str(json.loads(f'"{quoted[1]}"'))
    bare = re.search(rf"{GOAL_PREFIX}.*\S", grammar)
    if bare is None:
        raise DataError(f"grammar: no {GOAL_PREFIX!r} line; give the game a goal sentence")
    return bare[0]


def read_wording(grammar: str, domain: str) -> Wording:
    """Read the wording of a game; parts that the two texts leave out are the current release's.

    Raises:
        DataError: a full grammar says something this engine would say otherwise.
    """
    plain = re.sub(r"\{(\w+)\.name\}", r"{\1}", grammar)
    current = Wording()
    if '"examineObject.feedback"' in plain:
        _refuse_other_texts(plain)
    arrive = _find(r'"GotoLocation\.feedback": \[ \{ "rhs": "(.*?)#', plain, current.arrive)
    return Wording(
        put_command=_find(r'action PutObject \{ template :: "(.*?)"', plain, current.put_command),
        put=_find(r'"PutObject\.feedback": \[ \{ "rhs": "(.*?)"', plain, current.put),
        arrive=arrive.replace("{lend}", "{l}"),
        help=current.help if not domain.strip() or "(:action help" in domain else None,
    )


def _find(pattern: str, text: str, default: str) -> str:
    found = re.search(pattern.replace(" ", r"\s*"), text)
    return found[1] if found else default


def _refuse_other_texts(plain_grammar: str) -> None:
    known = plain_grammar.replace("{co}", "{o}").replace("{ko}", "{k}")
    for text in _FIXED_TEXTS:
        if text not in known:
            raise DataError(f"grammar: {text!r} is missing; play it with env.engine: textworld")
