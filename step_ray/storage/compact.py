"""Merging the shards of a folder, so that the number of files stays bounded.

Takes a folder to which one process appends shards, leaves the same rows in fewer and larger files,
ordered by id. A merged file counts from the moment it is there, because it names what it replaces;
only then are those files removed, by the next merge if this one is killed. It drops no row: what
was spent on an episode that was played again counts too.
"""

import json
import re
import time
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from step_ray.storage.records import VERSION_KEY
from step_ray.storage.remote import remove
from step_ray.storage.shards import (
    MERGED,
    REPLACES_KEY,
    open_shard,
    read_index,
    replaced_by,
    shard_paths,
)
from step_ray.store import atomic

FAN_IN = 64
"""Files of one level that become one of the next; also the files that need no merge at the end."""
TOP_LEVEL = 2
"""Files of this level stay as they are: about 65,000 episodes, 64 * 64 shards of 16."""
ROWS_PER_GROUP = 64
"""Readers hold one row group of each file at a time."""
OLD_S = 3600.0
"""Half-written files of this age belong to a process that was killed."""
_NAME = re.compile(rf"\d{{20}}-[0-9a-f]{{12}}(?:{MERGED}(\d))?\.parquet")
"""Files that were put there by hand are left alone: only a name that never comes again may be
called replaced."""


def compact(folder: str | Path, fan_in: int = FAN_IN) -> int:
    """Merge each `fan_in` neighbours of one level into one of the next, as long as there are any.

    At most one process may do this in a folder at a time; readers and the writer of shards need not
    care. In shards of 16, 10^6 episodes are 15 files, and at most 63 of each lower level.

    Returns:
        How many merges were done.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    sweep(folder)
    num_merges = 0
    for level in range(TOP_LEVEL):
        for run in list(_runs(shard_paths(folder), [level])):
            for start in range(0, len(run) - fan_in + 1, fan_in):
                merge(run[start : start + fan_in], level + 1)
                num_merges += 1
    return num_merges


def settle(folder: str | Path, fan_in: int = FAN_IN) -> None:
    """Leave few files at the end of a job: merge all below the top level if they are many.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    compact(folder, fan_in)
    paths = shard_paths(folder)
    if len(paths) <= fan_in:
        return
    for run in list(_runs(paths, range(TOP_LEVEL))):
        if len(run) > 1:
            merge(run, TOP_LEVEL)


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left: files that are replaced, and old half-written ones."""
    folder = Path(folder)
    for path in shard_paths(folder):
        for name in replaced_by(path) if MERGED in path.name else ():
            remove(folder / name)
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # a shard that was being written has got its name
            if time.time() - path.stat().st_mtime > OLD_S:
                path.unlink()


def merge(paths: Sequence[Path], level: int) -> Path:
    """Put neighbouring files into one; rows of one id keep their order.

    Returns:
        The new file; its name sorts where the last of `paths` did.
    """
    last = paths[-1]
    target = last.with_name(f"{last.stem.partition(MERGED)[0]}{MERGED}{level}.parquet")
    schema = _schema(paths)
    with atomic(target) as temp, pq.ParquetWriter(temp, schema, compression="zstd") as writer:
        for table in read_index(paths).tables():
            whole = [schema.empty_table(), table]
            table = pa.concat_tables(whole, promote_options="permissive").cast(schema)
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
    for path in paths:
        remove(path)
    return target


def _schema(paths: Sequence[Path]) -> pa.Schema:
    """All fields that any of the files has; what a file lacks is null, as readers expect."""
    schemas = []
    for path in paths:
        with open_shard(path) as file:
            schemas.append(file.schema_arrow)
    version = max(int(schema.metadata[VERSION_KEY]) for schema in schemas)
    names = json.dumps([path.name for path in paths])
    metadata = {VERSION_KEY: str(version), REPLACES_KEY: names}
    return pa.unify_schemas(schemas, promote_options="permissive").with_metadata(metadata)


def _runs(paths: Sequence[Path], levels: Container[int | None]) -> Iterator[list[Path]]:
    """Neighbours whose level is one of these."""
    for chosen, group in groupby(paths, key=lambda path: _level(path) in levels):
        if chosen:
            yield list(group)


def _level(path: Path) -> int | None:
    """How often the rows of a file were merged; None: not for us to touch."""
    match = _NAME.fullmatch(path.name)
    return int(match[1] or 0) if match else None


class Compactor:
    """Keeps a folder compact while shards are written to it, on a thread of its own."""

    def __init__(self, folder: Path, fan_in: int = FAN_IN) -> None:
        self._folder, self._fan_in = folder, fan_in
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compact")
        self._job: Future[int] | None = None
        self._num_written = fan_in  # what is there may need a merge already

    def wrote(self) -> None:
        """A shard was written; raises what an earlier merge raised."""
        self._num_written += 1
        if self._job is not None and self._job.done():
            self._job.result()
            self._job = None
        if self._job is None and self._num_written > self._fan_in:
            self._num_written = 0
            self._job = self._thread.submit(compact, self._folder, self._fan_in)

    def close(self, *, settled: bool) -> None:
        """Wait for the merge that is under way; `settled`: then leave few files."""
        self._thread.shutdown()
        if settled:
            settle(self._folder, self._fan_in)
