"""Trajectories and small JSON files on disk, and in the store behind a mirror.

Takes and gives `Trajectory` records; a folder holds any number of Parquet shards, each written
once, whole or not at all (shards.py: which of them count). Readers hold a few thousand episodes in
memory, however many there are. It never edits a shard, and it knows nothing about masks or tokens.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from step_ray.errors import DataError
from step_ray.storage.records import SCHEMA, from_row, to_row, usage_from_row
from step_ray.storage.remote import push
from step_ray.storage.shards import Index, read_columns, read_index, read_table, shard_paths
from step_ray.types import ERROR_STOPS, StepKind, StopReason, Trajectory, Usage

_Result = TypeVar("_Result")

_ROWS_AT_ONCE = 256
"""Episodes that are Python objects at a time."""
_MAX_RESTARTS = 20
"""How often a reader starts again because files were merged under it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an episode ended and what it cost: a trajectory without its text."""

    trajectory_id: str
    success: bool
    stop_reason: StopReason
    num_steps: int
    num_corrections: int
    """Steps that the teacher wrote."""
    usage: Usage
    error: str | None = None
    is_taught: bool = False
    """There was a teacher."""

    @classmethod
    def of(cls, trajectory: Trajectory) -> "Outcome":
        """The outcome of a trajectory."""
        return cls(
            trajectory_id=trajectory.trajectory_id,
            success=trajectory.success,
            stop_reason=trajectory.stop_reason,
            num_steps=len(trajectory.steps),
            num_corrections=sum(s.kind is StepKind.CORRECTION for s in trajectory.steps),
            usage=trajectory.usage,
            error=trajectory.error,
            is_taught="teacher" in trajectory.models,
        )


_OUTCOME_COLUMNS = (
    *("trajectory_id", "success", "stop_reason", "error", "usage", "models"),
    "steps.list.element.kind",
)


def write_shard(folder: str | Path, trajectories: Sequence[Trajectory]) -> Path:
    """Write one new shard and return its path; the name sorts by time of writing.

    Raises:
        ValueError: no trajectories.
    """
    if not trajectories:
        raise ValueError("write_shard: no trajectories")
    return write_large_shard(folder, trajectories)


def write_large_shard(folder: str | Path, trajectories: Iterable[Trajectory]) -> Path:
    """`write_shard` of trajectories as they come, one at least, that need not fit into memory."""
    path = Path(folder) / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.parquet"
    write_rows(path, SCHEMA, map(to_row, trajectories), rows_per_group=_ROWS_AT_ONCE)
    return path


def iter_trajectories(
    folder: str | Path, ids: pa.Array | None = None, text: str = ""
) -> Iterator[Trajectory]:
    """Every trajectory of the folder once, sorted by id; half-written files do not count.

    Of two rows with one id, a stop that is no error beats an error stop, else the later shard wins.

    Args:
        folder: where the shards are.
        ids: only these (large strings); None: all.
        text: only those whose id contains it.

    Raises:
        DataError: the folder is missing, or a shard is broken or newer than this version.
    """
    _check_folder(folder)
    yield from map(from_row, _iter_rows(folder, None, ids, text))


def trajectory_ids(folder: str | Path) -> pa.Array:
    """The ids of `iter_trajectories` (large strings), sorted.

    Raises:
        DataError: the folder is missing, or a shard is broken or newer than this version.
    """
    _check_folder(folder)
    return _steady(folder, lambda paths: read_index(paths).winners().ids)


def read_trajectories(folder: str | Path) -> list[Trajectory]:
    """All of `iter_trajectories` at once, for folders that fit into memory."""
    return list(iter_trajectories(folder))


def iter_outcomes(folder: str | Path, ids: pa.Array | None = None) -> Iterator[Outcome]:
    """The outcomes of `iter_trajectories`; the text of the episodes is not read.

    Raises:
        DataError: the folder is missing, or a shard is broken or newer than this version.
    """
    _check_folder(folder)
    yield from map(_outcome, _iter_rows(folder, _OUTCOME_COLUMNS, ids))


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(
        trajectory_id=row["trajectory_id"],
        success=row["success"],
        stop_reason=StopReason(row["stop_reason"]),
        num_steps=len(row["steps"]),
        num_corrections=sum(s["kind"] == StepKind.CORRECTION for s in row["steps"]),
        usage=usage_from_row(row["usage"]),
        error=row["error"],
        is_taught="teacher" in dict(row["models"]),
    )


def _check_folder(folder: str | Path) -> None:
    if not Path(folder).is_dir():
        raise DataError(f"trajectories: no folder {str(folder)!r}; collect first or give another")


def _iter_rows(
    folder: str | Path, columns: Sequence[str] | None, ids: pa.Array | None = None, text: str = ""
) -> Iterator[dict[str, Any]]:
    """The row of each id, in the order of the ids.

    When files were merged away meanwhile it looks again, and goes on behind the last id it gave.
    """
    last = ""
    for attempt in range(_MAX_RESTARTS):
        try:
            for row in _rows(read_index(shard_paths(folder)), columns, ids, text, last):
                yield row
                last = row["trajectory_id"]
            return
        except FileNotFoundError as exc:
            if attempt == _MAX_RESTARTS - 1:
                raise _restless(folder) from exc


def _rows(
    index: Index, columns: Sequence[str] | None, ids: pa.Array | None, text: str, after: str
) -> Iterator[dict[str, Any]]:
    index = index.winners()
    index = index if ids is None else index.only(ids)
    index = index.where(pc.match_substring(index.ids, text)) if text else index
    index = index.where(pc.greater(index.ids, after)) if after else index
    for table in index.tables(columns):
        for start in range(0, len(table), _ROWS_AT_ONCE):
            yield from table.slice(start, _ROWS_AT_ONCE).to_pylist()


def finished_ids(
    folder: str | Path, retry: Collection[StopReason] = frozenset(ERROR_STOPS)
) -> pa.Array:
    """Ids (large strings) that need no further episode; a missing folder has none.

    Reads two columns. Ids that only ever stopped for a reason in `retry` are left out.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    return _steady(folder, lambda paths: read_index(paths).finished(retry))


def completed_ids(
    folder: str | Path, retry: Collection[StopReason] = frozenset(ERROR_STOPS)
) -> set[str]:
    """`finished_ids` as a set, which takes several times the memory."""
    return set(finished_ids(folder, retry).to_pylist())


def total_usage(folder: str | Path) -> Usage:
    """The usage of all rows together, those of episodes that were played again included.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    return _steady(folder, _sum_usage)


def _sum_usage(paths: Sequence[Path]) -> Usage:
    sums: dict[str, Any] = {field.name: field.default for field in fields(Usage)}
    for path in paths:
        usage = read_columns(path, ["usage"])["usage"].combine_chunks()
        for field in usage.type:
            if field.name in sums:
                sums[field.name] += pc.sum(usage.field(field.name)).as_py() or 0
    return Usage(**sums)


def _steady(folder: str | Path, read: Callable[[list[Path]], _Result]) -> _Result:
    """What `read` makes of the shards, read again when some were merged away meanwhile."""
    for _ in range(_MAX_RESTARTS):
        try:
            return read(shard_paths(folder))
        except FileNotFoundError:
            continue
    raise _restless(folder)


def _restless(folder: str | Path) -> DataError:
    return DataError(f"folder {str(folder)!r}: its files change too fast to be read; try again")


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one Parquet file written by step_ray.

    Raises:
        DataError: the file cannot be read, or is newer than this version.
    """
    try:
        rows: list[dict[str, Any]] = read_table(path, columns).to_pylist()
    except FileNotFoundError as exc:
        raise DataError(f"file {str(path)!r}: it is missing; run again") from exc
    return rows


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all; the folder is made."""
    with atomic(path) as temp:
        pq.write_table(table, temp)


def write_rows(
    path: Path,
    schema: pa.Schema,
    rows: Iterable[Mapping[str, Any]],
    rows_per_group: int = 4096,
) -> None:
    """Write a Parquet file of rows as they come, whole or not at all; the folder is made."""
    coming = iter(rows)
    with atomic(path) as temp, pq.ParquetWriter(temp, schema) as writer:
        while chunk := list(islice(coming, rows_per_group)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as JSON, whole or not at all; an existing file is replaced."""
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    with atomic(Path(path)) as temp:
        temp.write_text(text, encoding="utf-8")


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines of text as they come, whole or not at all; an existing file is replaced."""
    with atomic(Path(path)) as temp, temp.open("w", encoding="utf-8", newline="\n") as file:
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
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    On return a file of a mirror is in the store behind it, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temp
        _sync(temp)
        os.replace(temp, path)  # noqa: PTH105 - the name of the guarantee
        _sync(path.parent)
    finally:
        temp.unlink(missing_ok=True)
    push(path)


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a crash after the rename finds its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
