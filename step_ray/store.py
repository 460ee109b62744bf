"""Trajectories and small JSON files on disk.

Takes and gives `Trajectory` records; a folder holds any number of Parquet shards, each written
once, whole or not at all. It never edits a shard, and it knows nothing about masks or tokens.
"""

import json
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from step_ray.errors import DataError
from step_ray.types import (
    ERROR_STOPS,
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


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """The trajectory as a row of `SCHEMA`: plain Python values, maps as sorted pairs."""
    row: dict[str, Any] = _plain(trajectory)
    return row


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The trajectory of a row; maps may be pairs (pyarrow) or dicts.

    Raises:
        DataError: written by a newer version of step_ray, a field missing, an unknown enum value.
    """
    _check_version(row.get("schema_version"), f"trajectory {row.get('trajectory_id')!r}")
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
            usage=_build(Usage, row["usage"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        name = f"trajectory {row.get('trajectory_id')!r}"
        raise DataError(f"{name}: not a trajectory record ({exc}); collect it again") from exc


def write_shard(folder: str | Path, trajectories: Sequence[Trajectory]) -> Path:
    """Write one new shard and return its path; the name sorts by time of writing.

    Raises:
        ValueError: no trajectories.
    """
    if not trajectories:
        raise ValueError("write_shard: no trajectories")
    path = Path(folder) / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.parquet"
    rows = [to_row(trajectory) for trajectory in trajectories]
    write_table(path, pa.Table.from_pylist(rows, schema=SCHEMA))
    return path


def read_trajectories(folder: str | Path) -> list[Trajectory]:
    """Every trajectory of the folder once, sorted by id; half-written files do not count.

    Of two rows with one id, a stop that is no error beats an error stop, else the later shard wins.

    Raises:
        DataError: the folder is missing, or a shard is broken or newer than this version.
    """
    if not Path(folder).is_dir():
        raise DataError(f"trajectories: no folder {str(folder)!r}; collect first or give another")
    best: dict[str, Trajectory] = {}
    for path in _shards(folder):
        for row in read_rows(path):
            new = from_row(row)
            old = best.get(new.trajectory_id)
            if old is None or old.stop_reason in ERROR_STOPS or new.stop_reason not in ERROR_STOPS:
                best[new.trajectory_id] = new
    return [best[name] for name in sorted(best)]


def completed_ids(
    folder: str | Path, retry: Collection[StopReason] = frozenset(ERROR_STOPS)
) -> set[str]:
    """Ids that need no further episode; a missing folder has none.

    Reads two columns. Ids that only ever stopped for a reason in `retry` are left out.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    return {
        row["trajectory_id"]
        for path in _shards(folder)
        for row in read_rows(path, columns=["trajectory_id", "stop_reason"])
        if row["stop_reason"] not in retry
    }


def read_usages(folder: str | Path) -> list[Usage]:
    """The usage of all rows, those of episodes that were played again included.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    return [
        _build(Usage, row["usage"])
        for path in _shards(folder)
        for row in read_rows(path, columns=["usage"])
    ]


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one Parquet file written by step_ray.

    Raises:
        DataError: the file cannot be read, or is newer than this version.
    """
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
            _check_version(metadata.get(VERSION_KEY), f"file {str(path)!r}")
            rows: list[dict[str, Any]] = file.read(columns=columns).to_pylist()
            return rows
    except (pa.ArrowException, OSError) as exc:
        line = " ".join(str(exc).split())[:200]
        raise DataError(f"file {str(path)!r}: broken; delete it and run again ({line})") from exc


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all; the folder is made."""
    with _atomic(path) as temp:
        pq.write_table(table, temp)


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as JSON, whole or not at all; an existing file is replaced."""
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    with _atomic(Path(path)) as temp:
        temp.write_text(text, encoding="utf-8")


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines of text as they come, whole or not at all; an existing file is replaced."""
    with _atomic(Path(path)) as temp, temp.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"file {str(path)!r}: cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise DataError(f"file {str(path)!r}: not valid JSON ({exc}); delete it") from exc


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temp
        _sync(temp)
        os.replace(temp, path)  # noqa: PTH105 - the name of the guarantee
        _sync(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a crash after the rename finds its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shards(folder: str | Path) -> list[Path]:
    return sorted(p for p in Path(folder).glob("*.parquet") if not p.name.startswith("."))


def _check_version(version: Any, what: str) -> None:
    """Refuse data that this version cannot read; `version` may be bytes (Parquet metadata)."""
    if version is None:
        raise DataError(f"{what}: no schema_version; step_ray did not write it, remove it")
    if int(version) > SCHEMA_VERSION:
        raise DataError(
            f"{what}: schema_version {int(version)}, this step_ray reads up to {SCHEMA_VERSION};"
            " upgrade step_ray"
        )


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return sorted(value.items())
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _build(record: type[_Record], row: Mapping[str, Any], **converted: Any) -> _Record:
    """A record from the fields that the row has; fields added since then take their defaults."""
    names = {field.name for field in fields(record)}  # type: ignore[arg-type]
    return record(**({name: row[name] for name in names & row.keys()} | converted))


def _step(row: Mapping[str, Any]) -> Step:
    verdict = row["verdict"]
    return _build(
        Step,
        row,
        kind=StepKind(row["kind"]),
        author=Author(row["author"]),
        verdict=verdict and _build(Verdict, verdict, label=VerdictLabel(verdict["label"])),
    )
