"""Random play of ALFWorld, made from what has been read: material for pretraining a tiny base.

Takes a `Belief` and a random generator, gives a command. Many commands do nothing, on purpose: a
model that never read "Nothing happens." cannot learn from it later.
"""

import random
from collections.abc import Sequence

from step_ray.envs.alfworld.belief import Belief
from step_ray.envs.alfworld.judge import replay
from step_ray.player import HistoryPlayer

_VERBS = ("go", "go", "go", "open", "take", "take", "put", "treat", "examine", "look", "use")


def random_action(belief: Belief, rng: random.Random) -> str:
    """A command about things that the belief knows, possible or not."""
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


class Explorer(HistoryPlayer):
    """Random play behind the `ChatModel` interface; the same seed plays the same episode."""

    name = "explorer:alfworld"

    def play(self, first: str, history: Sequence[tuple[str, str]], draw: str) -> tuple[str, str]:
        """A random command without a thought."""
        return "", random_action(replay(first, history), random.Random(draw))
