"""The stored form of a trajectory: the Arrow schema, and records <-> rows.

Takes and gives `Trajectory` records and plain rows. It reads and writes no file.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

import pyarrow as pa

from step_ray.errors import DataError
from step_ray.types import (
    SCHEMA_VERSION,
    Author,
    Message,
    Source,
    Step,
    StepKind,
    StopReason,
    Task,
    Trajectory,
    Usage,
    Verdict,
    VerdictLabel,
    best_sum,
)

_Record = TypeVar("_Record")

VERSION_KEY = b"step_ray.schema_version"
"""Key of the schema version in the metadata of a Parquet file."""

_TEXT_MAP = pa.map_(pa.string(), pa.string())
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_TASK = pa.struct(
    [(name, pa.string()) for name in ("task_id", "env", "split", "goal", "task_type")]
    + [("params", _TEXT_MAP)]
)
_VERDICT = pa.struct(
    [(name, pa.string()) for name in ("label", "reflection", "thought", "action", "error_type")]
)
_STEP = pa.struct(
    [("index", pa.int64())]
    + [(name, pa.string()) for name in ("kind", "author", "text", "thought", "action")]
    + [
        ("observation", pa.string()),
        ("reward", pa.float64()),
        ("reflection", pa.string()),
        ("verdict", _VERDICT),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("noop", pa.bool_()),
    ]
)
_USAGE = pa.struct(
    [
        (name, pa.int64())
        for name in (
            "env_steps",
            "student_calls",
            "teacher_calls",
            "prompt_tokens",
            "completion_tokens",
            "teacher_prompt_tokens",
            "teacher_completion_tokens",
            "retries",
        )
    ]
    + [("seconds", pa.float64())]
    + [
        (name, pa.int64())
        for name in ("teacher_cached_calls", "teacher_unstructured_calls", "cache_faults")
    ]
    + [("student_cost", pa.float64()), ("teacher_cost", pa.float64())]
)
SCHEMA = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("trajectory_id", pa.string()),
        ("task", _TASK),
        ("prompt", pa.list_(_MESSAGE)),
        ("steps", pa.list_(_STEP)),
        ("reward", pa.float64()),
        ("success", pa.bool_()),
        ("stop_reason", pa.string()),
        ("source", pa.string()),
        ("seed", pa.int64()),
        ("error", pa.string()),
        ("models", _TEXT_MAP),
        ("prompt_version", pa.string()),
        ("engine", pa.string()),
        ("usage", _USAGE),
        ("producer", pa.string()),
        ("best_reward", pa.float64()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""One row per trajectory; enums are strings, `task.params` and `models` are string maps."""


_AS_THEY_ARE = frozenset({str, int, float, bool, type(None)})


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """The trajectory as a row of `SCHEMA`: plain Python values, maps as sorted pairs."""
    row: dict[str, Any] = _plain(trajectory)
    return row


def usage_from_row(row: Mapping[str, Any]) -> Usage:
    """The usage of a row's `usage`."""
    return _build(Usage, row)


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row; maps may be pairs (pyarrow) or dicts.

    Raises:
        DataError: written by a newer version of step_ray, a field missing, an unknown enum value.
    """
    check_version(row.get("schema_version"), f"trajectory {row.get('trajectory_id')!r}")
    try:
        steps = tuple(_step(step) for step in row["steps"])
        best = row.get("best_reward")  # rows written before it was recorded have none
        return _build(
            Trajectory,
            row,
            best_reward=best_sum(steps) if best is None else best,
            task=_build(Task, row["task"], params=dict(row["task"]["params"])),
            prompt=tuple(_build(Message, message) for message in row["prompt"]),
            steps=steps,
            stop_reason=StopReason(row["stop_reason"]),
            source=Source(row["source"]),
            models=dict(row["models"]),
            usage=usage_from_row(row["usage"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        name = f"trajectory {row.get('trajectory_id')!r}"
        raise DataError(f"{name}: not a trajectory record ({exc}); collect it again") from exc


def check_version(version: Any, what: str) -> None:
    """Refuse data that this version cannot read; `version` may be bytes (Parquet metadata)."""
    if version is None:
        raise DataError(f"{what}: no schema_version; step_ray did not write it, remove it")
    if int(version) > SCHEMA_VERSION:
        raise DataError(
            f"{what}: schema_version {int(version)}, this step_ray reads up to {SCHEMA_VERSION};"
            " upgrade step_ray"
        )


def _plain(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:  # nearly all of them: a subclass, as an enum is, is not
        return value
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return sorted(value.items())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _build(record: type[_Record], row: Mapping[str, Any], **converted: Any) -> _Record:
    """A record from the fields that the row has; fields added since then take their defaults.

    Files of several versions are read side by side, which makes a missing field a null.
    """
    given = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = row.get(field.name)
        if value is not None or (field.name in row and field.default in (None, MISSING)):
            given[field.name] = value
    return record(**(given | converted))


def _step(row: Mapping[str, Any]) -> Step:
    verdict = row["verdict"]
    return _build(
        Step,
        row,
        kind=StepKind(row["kind"]),
        author=Author(row["author"]),
        verdict=verdict and _build(Verdict, verdict, label=VerdictLabel(verdict["label"])),
    )
