"""One folder of Parquet shards as Arrow tables: which files count, and which row of each id.

Takes a folder or paths, gives paths, an `Index` and tables in the order of the ids, with bounded
memory. Files appear whole, are never edited, and vanish only after a file that holds their rows has
taken their place (compact.py), which may happen while somebody reads. It builds no records and
writes nothing.
"""

import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from step_ray.errors import DataError
from step_ray.storage.records import VERSION_KEY, check_version
from step_ray.types import ERROR_STOPS, StopReason

REPLACES_KEY = b"step_ray.replaces"
"""Key in the metadata of a merged file: the names of the files whose rows it holds, as JSON."""
MERGED = "-merged"
"""In the name of a merged file, before its level and its ending."""
WINDOW_ROWS = 4096
"""Rows that are put in order together: about 100 MB of long episodes."""
CACHE_BYTES = 128 * 2**20
"""Row groups that are kept because the next window goes on in them."""
OPEN_FILES = 256


def shard_paths(folder: str | Path) -> list[Path]:
    """The files of a folder whose rows count, in the order of their writing; none if it is missing.

    A merged file counts as soon as it is there, and what it replaces no more.
    """
    paths = _listed(folder)
    gone = {name for path in paths if MERGED in path.name for name in replaced_by(path)}
    return [path for path in paths if path.name not in gone]


def replaced_by(path: Path) -> list[str]:
    """Names of the files whose rows a merged file holds; they may be there still."""
    with open_shard(path) as file:
        names: list[str] = json.loads(file.schema_arrow.metadata.get(REPLACES_KEY, b"[]"))
        return names


def _listed(folder: str | Path) -> list[Path]:
    """All whole files, by name. A listing is no snapshot, but two equal ones in a row are."""
    before: list[Path] | None = None
    while True:
        found = sorted(p for p in Path(folder).glob("*.parquet") if not p.name.startswith("."))
        if found == before:
            return found
        before = found


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a Parquet file written by step_ray.

    Raises:
        FileNotFoundError: it has vanished, see `shard_paths`.
        DataError: it is broken, somebody else's, or newer than this version.
    """
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as exc:
        raise _broken(path, exc) from exc
    check_version((file.schema_arrow.metadata or {}).get(VERSION_KEY), f"file {str(path)!r}")
    return file


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one file; errors as in `open_shard`."""
    with open_shard(path) as file:
        try:
            return file.read(columns=columns)
        except (pa.ArrowException, OSError) as exc:
            raise _broken(path, exc) from exc


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Columns of a file of trajectories.

    Raises:
        FileNotFoundError: it has vanished, see `shard_paths`.
        DataError: it has no such columns, or as in `open_shard`.
    """
    table = read_table(path, names)
    if table.column_names != list(names):
        raise DataError(f"file {str(path)!r}: it holds no trajectories; move it elsewhere")
    return table


def _broken(path: Path, exc: Exception) -> DataError:
    line = " ".join(str(exc).split())[:200]
    return DataError(f"file {str(path)!r}: broken; delete it and run again ({line})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Where the rows of some files are, ordered by id; of one id the row that counts is the last.

    A stop that is no error beats an error stop, else the later row wins. About 100 bytes a row.
    """

    paths: tuple[Path, ...]
    ids: pa.Array
    """Large strings, ascending."""
    stops: pa.Array
    """Values of `types.StopReason`, dictionary-encoded."""
    files: np.ndarray
    """Number of each row's file in `paths`."""
    rows: np.ndarray
    """Number of each row in its file."""

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, mask: pa.Array | np.ndarray) -> "Index":
        """The rows at which the mask is true."""
        mask = np.asarray(mask)
        chosen = pa.array(mask)
        return Index(
            paths=self.paths,
            ids=self.ids.filter(chosen),
            stops=self.stops.filter(chosen),
            files=self.files[mask],
            rows=self.rows[mask],
        )

    def winners(self) -> "Index":
        """Each id once."""
        last = np.ones(len(self), dtype=bool)
        if len(self) > 1:
            last[:-1] = pc.not_equal(self.ids[:-1], self.ids[1:]).to_numpy(zero_copy_only=False)
        return self.where(last)

    def only(self, ids: pa.Array) -> "Index":
        """The rows whose id is among `ids` (large strings)."""
        return self.where(pc.is_in(self.ids, value_set=ids))

    def finished(self, retry: Collection[StopReason]) -> pa.Array:
        """Each id once that stopped at least once for a reason that is not in `retry`."""
        again = pa.array([stop.value for stop in retry], pa.string())
        stops = self.stops.cast(pa.string())
        return self.ids.filter(pc.invert(pc.is_in(stops, value_set=again))).unique()

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows in the order of the index, `WINDOW_ROWS` at a time; see `open_shard`."""
        groups = _Groups(self.paths, columns)
        for start in range(0, len(self), WINDOW_ROWS):
            window = slice(start, start + WINDOW_ROWS)
            yield _ordered(groups, self.files[window], self.rows[window])


def read_index(paths: Sequence[Path]) -> Index:
    """Read the ids and stop reasons of some files.

    Raises:
        FileNotFoundError: one has vanished, see `shard_paths`.
        DataError: one is broken, holds no trajectories or is newer than this version.
    """
    tables = [_id_columns(path) for path in paths]
    table = pa.concat_tables(tables) if tables else _ID_SCHEMA.empty_table()
    faulty = pa.array([stop.value for stop in ERROR_STOPS], pa.string())
    sizes = [len(part) for part in tables]
    order = pc.sort_indices(
        pa.table(
            {
                "id": table["id"],
                "fine": pc.invert(pc.is_in(table["stop"], value_set=faulty)).cast(pa.int8()),
                "place": np.arange(len(table)),
            }
        ),
        sort_keys=[(name, "ascending") for name in ("id", "fine", "place")],
    )
    places = order.to_numpy()
    return Index(
        paths=tuple(paths),
        ids=table["id"].take(order).combine_chunks(),
        stops=table["stop"].dictionary_encode().unify_dictionaries().combine_chunks().take(order),
        files=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[places],
        rows=np.concatenate([np.arange(n) for n in sizes] or [np.arange(0)])[places],
    )


_ID_SCHEMA = pa.schema([("id", pa.large_string()), ("stop", pa.string())])


def _id_columns(path: Path) -> pa.Table:
    table = read_columns(path, ["trajectory_id", "stop_reason"])
    return table.rename_columns(_ID_SCHEMA.names).replace_schema_metadata().cast(_ID_SCHEMA)


def _ordered(groups: "_Groups", files: np.ndarray, rows: np.ndarray) -> pa.Table:
    """The given rows of the given files as one table, in the given order."""
    pieces: list[pa.Table] = []
    places: list[np.ndarray] = []
    for number in np.unique(files):
        at = np.flatnonzero(files == number)
        bounds = groups.bounds(number)
        group_of = np.searchsorted(bounds, rows[at], side="right") - 1
        for group in np.unique(group_of):
            inside = at[group_of == group]
            table = groups.table(number, int(group))
            pieces.append(table.take(pa.array(rows[inside] - bounds[group])))
            places.append(inside)
    table = pa.concat_tables(pieces, promote_options="permissive")
    return table.take(pa.array(np.argsort(np.concatenate(places))))


class _Groups:
    """Row groups of many files; the ones used last stay in memory, and their files open."""

    def __init__(self, paths: Sequence[Path], columns: Sequence[str] | None) -> None:
        self._paths, self._columns = paths, columns
        self._files: OrderedDict[int, tuple[pq.ParquetFile, np.ndarray]] = OrderedDict()
        self._tables: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._bytes = 0

    def bounds(self, number: int) -> np.ndarray:
        """The first row of each row group of a file."""
        return self._open(number)[1]

    def table(self, number: int, group: int) -> pa.Table:
        """One row group."""
        key = (number, group)
        if key not in self._tables:
            file = self._open(number)[0]
            try:
                table = file.read_row_group(group, columns=self._columns)
            except (pa.ArrowException, OSError) as exc:
                raise _broken(self._paths[number], exc) from exc
            self._tables[key] = table
            self._bytes += table.nbytes
            while self._bytes > CACHE_BYTES and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        self._tables.move_to_end(key)
        return self._tables[key]

    def _open(self, number: int) -> tuple[pq.ParquetFile, np.ndarray]:
        if number not in self._files:
            file = open_shard(self._paths[number])
            meta = file.metadata
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            self._files[number] = file, np.cumsum([0, *sizes])[:-1]
            while len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(number)
        return self._files[number]
