"""Where data tools read and write: foreign record files, folders of trajectories, fresh outputs.

Takes paths, gives records one by one. It knows nothing of what is in a record.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from step_ray.errors import ConfigError, DataError

KINDS = (".jsonl", ".json", ".parquet")
_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}
_BATCH_ROWS = 256


def trajectory_folders(path: Path) -> dict[str, Path]:
    """The folders of trajectories that a path stands for, by name.

    Args:
        path: a run folder (all that it trains on: `trajectories/*`), or one folder of shards.

    Raises:
        DataError: neither.
    """
    parent = path / "trajectories"
    inside = sorted(p for p in parent.glob("*") if _holds_shards(p)) if parent.is_dir() else []
    if inside:
        return {folder.name: folder for folder in inside}
    if _holds_shards(path):
        return {path.name: path}
    raise DataError(
        f"PATH: {str(path)!r} holds no trajectories; give a run folder or one of its trajectories/*"
    )


def run_folder_of(path: Path) -> Path | None:
    """The run folder that a path is, or is in; None: there is none."""
    place = path.resolve()
    return next((p for p in (place, *place.parents[:2]) if (p / "run.json").is_file()), None)


def check_fresh(path: Path) -> None:
    """Refuse an output path that is taken; an empty folder is free.

    Raises:
        ConfigError: something is there.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty:
        raise ConfigError(f"OUT: {str(path)!r} is there already; give another path or remove it")


def read_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The records of a JSONL, JSON (one list) or Parquet file, each with its place.

    JSON may be packed: `.jsonl.xz`, `.json.gz`.

    Raises:
        DataError: the file cannot be read, is of another kind, or a record is no mapping.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in _OPENERS]
    kind = suffixes[-1] if suffixes else ""
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet_rows}
    if kind not in readers:
        raise DataError(f"file {str(path)!r}: its name ends in none of {list(KINDS)} (.xz, .gz)")
    try:
        for place, record in readers[kind](path):
            if not isinstance(record, Mapping):
                raise DataError(f"{place}: {type(record).__name__} where a record is expected")
            yield place, record
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeError, pa.ArrowException) as exc:
        line = " ".join(str(exc).split())[:200]
        raise DataError(f"file {str(path)!r}: cannot be read ({line}); mend it") from exc


def _holds_shards(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.glob("*.parquet"))


def _open(path: Path) -> IO[str]:
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        return path.open(encoding="utf-8-sig", newline="\n")
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path.name} line {number}"
                yield place, _parsed(line, place)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        records = _parsed(file.read(), path.name)
    if not isinstance(records, list):
        kind = type(records).__name__
        raise DataError(f"{path.name}: {kind} where a list of records is expected; give a list")
    for number, record in enumerate(records):
        yield f"{path.name} record {number}", record


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{place}: not valid JSON ({exc}); mend it") from exc


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield f"{path.name} row {number}", row
                number += 1
