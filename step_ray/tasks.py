"""Task lists: which tasks are U1 (expert), U2 (collect) and evaluation.

Takes a `RunConfig`, gives `TaskLists` with stable ids, and checks that no evaluation task is in
training. Which tasks there are is the environment's (`envs.base.TaskSource`).
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from step_ray.config import RunConfig
from step_ray.envs import task_source
from step_ray.errors import ConfigError
from step_ray.storage.records import VERSION_KEY
from step_ray.store import read_rows, write_table
from step_ray.types import SCHEMA_VERSION, Task

TASK_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("task_id", "env", "split", "goal", "task_type")]
    + [("params", pa.string())],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)
"""A task manifest: params as JSON, so that Ray Data moves plain columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLists:
    """The three task lists of a run; disjoint by id and, for evaluation, by content."""

    expert: tuple[Task, ...]
    """U1: golden trajectories."""
    collect: tuple[Task, ...]
    """U2: rollouts under the teacher."""
    evaluate: tuple[Task, ...]
    num_duplicates: int = 0
    """Training tasks left out because an evaluation task has the same content."""


def build_tasks(config: RunConfig) -> TaskLists:
    """List the tasks and deal them out: evaluation first, then U1, then U2.

    Which tasks are taken depends on `seed` and the ids only.

    Raises:
        ConfigError: fewer tasks than asked for.
    """
    source = task_source(config.env.name)
    evaluation = [
        task
        for split in config.tasks.eval_splits
        for task in _sample(source.held_out_tasks(config, split), config)
    ]
    held_out = set(source.fingerprints(evaluation))
    training = _shuffled(source.training_tasks(config), config.seed)
    wanted = config.tasks.num_expert + config.tasks.num_collect
    kept: list[Task] = []
    num_duplicates = 0
    for task, fingerprint in zip(training, source.fingerprints(training), strict=True):
        if fingerprint in held_out:
            num_duplicates += 1
        elif len(kept) < wanted:
            kept.append(task)
    if len(kept) < wanted:
        raise ConfigError(
            f"tasks.num_expert + tasks.num_collect: {wanted} asked for, {len(kept)} tasks there;"
            " lower them"
        )
    cut = config.tasks.num_expert
    return TaskLists(
        expert=tuple(kept[:cut]),
        collect=tuple(kept[cut:]),
        evaluate=tuple(evaluation),
        num_duplicates=num_duplicates,
    )


def _sample(tasks: list[Task], config: RunConfig) -> list[Task]:
    count = len(tasks) if config.tasks.num_eval == "all" else config.tasks.num_eval
    if len(tasks) < max(count, 1):
        asked = config.tasks.num_eval
        raise ConfigError(f"tasks.num_eval: {asked} asked for, {len(tasks)} tasks there; lower it")
    return sorted(_shuffled(tasks, config.seed)[:count], key=lambda task: task.task_id)


def _shuffled(tasks: Iterable[Task], seed: int) -> list[Task]:
    ordered = sorted(tasks, key=lambda task: task.task_id)
    random.Random(f"tasks/{seed}").shuffle(ordered)
    return ordered


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Write a task manifest (one Parquet file)."""
    columns = {name: [getattr(task, name) for task in tasks] for name in TASK_SCHEMA.names[:-1]}
    columns["params"] = [json.dumps(dict(task.params), sort_keys=True) for task in tasks]
    write_table(path, pa.table(columns, schema=TASK_SCHEMA))


def read_tasks(path: Path) -> list[Task]:
    """Read a task manifest."""
    return [task_from_row(row) for row in read_rows(path)]


def task_from_row(row: dict[str, str]) -> Task:
    """A task from a manifest row."""
    return Task(**{**row, "params": json.loads(row["params"])})
