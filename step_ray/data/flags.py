"""Per-turn loss flags under every name that training tools give them.

Takes one turn of a foreign record, gives whether it is trained; and the other way round. A flag is
on or off: a weight in between is refused, because no such weight would reach the loss.
"""

from collections.abc import Mapping
from typing import Any

from step_ray.errors import ConfigError, DataError

SWITCHES = ("train", "trainable", "loss")
"""Booleans: true is trained."""
NUMBERS = ("weight", "loss_weight", "loss_mask")
"""0 or 1: 1 is trained. `weight` is that of OpenAI's fine-tuning format."""
INVERTED = ("masked",)
"""Booleans: true is not trained."""
NAMES = (*SWITCHES, *NUMBERS, *INVERTED)


def check_name(name: str) -> None:
    """Refuse an unknown flag name.

    Raises:
        ConfigError: no tool that we know of calls a flag so.
    """
    if name not in NAMES:
        raise ConfigError(f"--flag: {name!r} is not known; use one of {list(NAMES)}")


def write_flag(name: str, trained: bool) -> bool | int:
    """The value that says `trained` under this name."""
    if name in NUMBERS:
        return int(trained)
    return trained != (name in INVERTED)


def read_flag(turn: Mapping[str, Any], place: str) -> bool | None:
    """Whether a turn is trained; None when it carries no flag, or null.

    Args:
        turn: keys and values as they came.
        place: where it stands, for the error.

    Raises:
        DataError: a value that is neither on nor off, or two flags that disagree.
    """
    said = {name: _switch(name, turn[name], place) for name in NAMES if turn.get(name) is not None}
    if len(set(said.values())) > 1:
        first, second = (next(n for n in said if said[n] is value) for value in (True, False))
        raise DataError(
            f"{place}: {first} is {turn[first]!r} and {second} is {turn[second]!r}, one says"
            " trained and one masked; remove one of them"
        )
    return next(iter(said.values()), None)


def _switch(name: str, value: Any, place: str) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        shown = repr(value)[:40]
        raise DataError(
            f"{place}: {name} is {shown}, but a turn is trained or not; use 0, 1, true or false"
        )
    return bool(value) != (name in INVERTED)
