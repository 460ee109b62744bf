"""ScienceWorld's tasks: the official variations, listed without an engine.

Takes a `RunConfig`, gives tasks whose params are `task` and `variation`, and adds gold paths for
the expert. See `base.TaskSource`.
"""

from collections.abc import Sequence

from step_ray.config import RunConfig
from step_ray.envs.base import RowMapper
from step_ray.envs.scienceworld import goldcache, tables
from step_ray.envs.scienceworld.jvm import engine_version, java_path
from step_ray.errors import ConfigError
from step_ray.types import Task


def check(config: RunConfig) -> None:
    """Engine and Java are there, and the held-out splits are some."""
    for split in config.tasks.eval_splits:
        _check_split(split)
    java_path()
    engine_version()


def prepare(config: RunConfig) -> None:
    """Nothing: the variations are made by the engine."""
    del config


def training_tasks(config: RunConfig) -> list[Task]:
    """The variations of the training split, by type and number."""
    return list_tasks(config.env.task_types, "train", config.env.scienceworld.train_per_type)


def held_out_tasks(config: RunConfig, split: str) -> list[Task]:
    """The variations of a split, the first ones of each type where that is limited."""
    _check_split(split)
    per_type = config.env.scienceworld.held_out_per_type
    return list_tasks(config.env.task_types, split, per_type)


def _check_split(split: str) -> None:
    if split not in tables.SPLITS:
        raise ConfigError(
            f"tasks.eval_split: {split!r} is no split of scienceworld; use 'test' or 'dev'"
        )


def list_tasks(task_types: Sequence[str], split: str, per_type: int | None = None) -> list[Task]:
    """The official variations of a split, at most the first `per_type` of each type."""
    return [
        make_task(task_type, number, split)
        for task_type in sorted(task_types)
        for number in tables.variations(task_type, split)[:per_type]
    ]


def make_task(task_type: str, variation: int, split: str) -> Task:
    """The task of one variation."""
    return Task(
        task_id=f"scienceworld/{task_type}/{variation}",
        env="scienceworld",
        split=split,
        goal="",
        task_type=task_type,
        params={"task": task_type, "variation": str(variation)},
    )


def fingerprints(tasks: Sequence[Task]) -> list[str]:
    """Type and variation: the benchmark makes its splits of variations."""
    return [task.task_id for task in tasks]


def equip(config: RunConfig, tasks: Sequence[Task], mapper: RowMapper) -> list[Task]:
    """The tasks with their gold paths, see `goldcache.equip`."""
    return goldcache.equip(config, tasks, mapper)
