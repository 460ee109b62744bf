"""Random play of ALFWorld with remarks on it: material for pretraining a tiny base.

Takes a `Belief` and a random generator, gives a command. Many commands do nothing, on purpose: a
model that never read "Nothing happens." cannot learn from it later. The remarks say why a command
did nothing and what is held, as any chat model could; they never say what would be better.
"""

import random
from collections.abc import Sequence

from step_ray.collection.player import HistoryPlayer
from step_ray.envs.alfworld.belief import NOTHING_HAPPENS, Belief, class_of
from step_ray.envs.alfworld.judge import nothing_text, replay

SHARE_WRONG = 0.2
"""Share of the commands that are drawn to be about what is not there."""

_VERBS = ("go", "go", "go", "open", "take", "take", "put", "treat", "examine", "look", "use")


def random_action(belief: Belief, rng: random.Random) -> str:
    """A command about things that the belief knows, possible or not."""
    if rng.random() < SHARE_WRONG:
        return _wrong_action(belief, rng)
    verb = rng.choice(_VERBS)
    place = rng.choice(belief.receptacles)
    here = belief.location or place
    things = belief.contents.get(here) or [x for xs in belief.contents.values() for x in xs]
    if verb == "open":
        return f"{rng.choice(('open', 'open', 'close'))} {here}"
    if verb == "put" and belief.holding:
        return f"move {belief.holding} to {here}"
    if verb == "treat" and belief.holding:
        return f"{rng.choice(('clean', 'heat', 'cool'))} {belief.holding} with {here}"
    if verb == "take" and things:
        return f"take {rng.choice(things)} from {here}"
    if verb in ("use", "examine") and things:
        return f"{verb} {rng.choice(things)}"
    return rng.choice(("look", "inventory")) if verb == "look" else f"go to {place}"


def _wrong_action(belief: Belief, rng: random.Random) -> str:
    """A command that most likely does nothing."""
    place = rng.choice(belief.receptacles)
    here = belief.location or place
    seen = [name for names in belief.contents.values() for name in names]
    thing = rng.choice([*seen, f"{belief.goal.target} 1"])
    verb = rng.choice(("go", "take", "take", "take", "move", "treat"))
    if verb == "go":
        return f"go to {class_of(place)} {rng.randint(1, 5)}"
    if verb == "take":
        return f"take {thing} from {rng.choice((here, here, place))}"
    if verb == "move":
        return f"move {thing} to {here}"
    return f"{rng.choice(('clean', 'heat', 'cool'))} {thing} with {here}"


def remark(first: str, history: Sequence[tuple[str, str]]) -> str:
    """What there is to say about the last command: why it did nothing, and what is held now."""
    if not history:
        return ""
    action, observation = history[-1]
    held = replay(first, history).holding
    status = f"I hold {held}." if held else "I hold nothing."
    if not observation.startswith(NOTHING_HAPPENS):
        return status
    return f"{nothing_text(replay(first, history[:-1]), action)} {status}"


class Explorer(HistoryPlayer):
    """Random play behind the `ChatModel` interface; the same seed plays the same episode."""

    name = "explorer:alfworld"

    def play(self, first: str, history: Sequence[tuple[str, str]], draw: str) -> tuple[str, str]:
        """A random command after a remark on the last one."""
        return remark(first, history), random_action(replay(first, history), random.Random(draw))
