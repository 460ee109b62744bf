"""Ray's node labels in settings: which nodes a stage's processes may run on.

Takes a mapping from the config, gives it back or names what Ray would refuse. It asks no cluster.
"""

import re
from typing import Annotated

from pydantic import AfterValidator

_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"({_NAME}(\.{_NAME})*/)?{_NAME}")
_WANTED = re.compile(rf"!?({_NAME}|in\({_NAME}(, ?{_NAME})*\))")
"""The syntax of `ray._private.label_utils` (Ray 2.60), which cannot be read without loading Ray."""


def _check(labels: dict[str, str]) -> dict[str, str]:
    for key, wanted in labels.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no label; use letters, digits and . _ - /")
        if not _WANTED.fullmatch(wanted):
            raise ValueError(
                f"{key}: {wanted!r} selects no node; use value, !value, in(a,b) or !in(a,b)"
            )
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_check)]
"""Label -> `value`, `!value`, `in(a,b)` or `!in(a,b)`."""
