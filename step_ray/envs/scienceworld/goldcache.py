"""The cache of gold paths: Parquet shards in `env.scienceworld.gold_dir`, filled in parallel.

Takes tasks, gives them with their path in the params; paths that the cache lacks are made first.
It never edits a shard; of two rows of one variation the later one counts.
"""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from step_ray.config import RunConfig, expand_path
from step_ray.envs.base import RowMapper
from step_ray.envs.scienceworld.env import FULL_SCORE
from step_ray.envs.scienceworld.gold import GoldMaker, GoldPath
from step_ray.envs.scienceworld.jvm import engine_version
from step_ray.errors import EnvError
from step_ray.storage.records import VERSION_KEY
from step_ray.store import read_rows, write_table
from step_ray.types import SCHEMA_VERSION, Task

GOLD = "gold"
"""Key of the path in a task's params: JSON of the lists in `IN_PARAMS`."""
IN_PARAMS = ("actions", "observations", "subgoals")
_TEXTS = pa.list_(pa.string())
GOLD_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("variation", pa.int64()),
        ("simplification", pa.string()),
        ("engine", pa.string()),
        *((name, _TEXTS) for name in IN_PARAMS),
        ("score", pa.int64()),
        ("num_raw_actions", pa.int64()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)
FLUSH_S = 30.0
"""Finished paths are written at least this often."""

Key = tuple[str, int]


def key_of(task: Task) -> Key:
    """Task type and variation."""
    return task.params["task"], int(task.params["variation"])


def gold_dir(config: RunConfig) -> Path:
    """Folder of the cache."""
    return expand_path("env.scienceworld.gold_dir", config.env.scienceworld.gold_dir)


def equip(config: RunConfig, tasks: Sequence[Task], mapper: RowMapper) -> list[Task]:
    """The tasks with their gold paths; missing ones are made.

    A task without a path that reaches the full score comes back as it is: playing it ends with an
    error row that says so.

    Raises:
        EnvError: no path could be made at all.
    """
    section = config.env.scienceworld
    keys = [key_of(task) for task in tasks]
    paths = fill(gold_dir(config), keys, section.simplification, section.heap_mb, mapper)
    usable = {key: path for key, path in paths.items() if path.score == FULL_SCORE}
    if keys and not usable:
        first = paths[keys[0]]
        raise EnvError(f"no gold path could be made; {first.task}: {first.error or first.score}")
    return [
        with_gold(task, usable[key]) if key in usable else task
        for task, key in zip(tasks, keys, strict=True)
    ]


def with_gold(task: Task, path: GoldPath) -> Task:
    """The task with a path in its params."""
    gold = json.dumps({name: list(getattr(path, name)) for name in IN_PARAMS})
    return Task(
        task_id=task.task_id,
        env=task.env,
        split=task.split,
        goal=task.goal,
        task_type=task.task_type,
        params={**task.params, GOLD: gold},
    )


def fill(
    folder: Path, keys: Sequence[Key], simplification: str, heap_mb: int, mapper: RowMapper
) -> dict[Key, GoldPath]:
    """The paths of these (task type, variation) pairs; what the cache lacks is made and written."""
    there = read_gold(folder, simplification, f"scienceworld {engine_version()}")
    missing = [key for key in dict.fromkeys(keys) if key not in there or there[key].error]
    rows = [{"task": task, "variation": variation} for task, variation in missing]
    if rows:
        made = mapper(GoldMaker, {"simplification": simplification, "heap_mb": heap_mb}, rows)
        for path in _written(folder, made):
            there[path.task, path.variation] = path
    return {key: there[key] for key in keys}


def _written(folder: Path, rows: Iterator[dict[str, Any]]) -> Iterator[GoldPath]:
    shard: list[dict[str, Any]] = []
    flushed = time.monotonic()
    try:
        for row in rows:
            record = json.loads(row["record"])
            shard.append(record)
            yield _path(record)
            if time.monotonic() - flushed > FLUSH_S:
                _write(folder, shard)
                shard, flushed = [], time.monotonic()
    finally:
        _write(folder, shard)


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.parquet"
        plain = [{name: row[name] for name in GOLD_SCHEMA.names} for row in rows]
        write_table(folder / name, pa.Table.from_pylist(plain, schema=GOLD_SCHEMA))


def read_gold(folder: Path, simplification: str, engine: str) -> dict[Key, GoldPath]:
    """The cached paths that hold for these settings; a missing folder has none.

    Raises:
        DataError: a shard is broken or newer than this version.
    """
    found = {}
    for shard in sorted(p for p in folder.glob("*.parquet") if not p.name.startswith(".")):
        for row in read_rows(shard):
            path = _path(row)
            if (path.simplification, path.engine) == (simplification, engine):
                found[path.task, path.variation] = path
    return found


def _path(row: dict[str, Any]) -> GoldPath:
    values = {field.name: row[field.name] for field in fields(GoldPath)}
    return GoldPath(**values | {name: tuple(row[name]) for name in IN_PARAMS})
