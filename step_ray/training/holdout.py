"""Which training tasks are held out for validation.

Takes the tasks of U1 and U2 and a share or a number, gives task ids and lines of counts. All models
of a run ask here, with the same lists, so they hold out the same tasks: an arm is never validated
on what its base agent was trained on, and validation losses can be compared. It reads no file.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from step_ray.errors import ConfigError
from step_ray.training.recipe import DatasetConfig
from step_ray.types import Trajectory


def held_out_tasks(
    lists: Iterable[Sequence[str]], config: DatasetConfig, *, seed: int
) -> frozenset[str]:
    """The task ids that are kept for validation: as large a part of each list.

    Which ones depends on the seed and the ids only; with a larger number come more, none leaves.

    Args:
        lists: task ids of U1 and of U2.
        config: `validation_tasks` of each list, or the share `validation_share` (one at least).
        seed: seed of the run.

    Raises:
        ConfigError: nothing of a list would be left to train on.
    """
    held: set[str] = set()
    for ids in lists:
        count = _count(len(ids), config)
        if count >= len(ids):
            raise ConfigError(
                f"dataset.validation_tasks: {count} of the {len(ids)} tasks of a list would be held"
                " out, which leaves nothing to train on; lower it"
            )
        held |= set(sorted(ids, key=lambda task: _rank(seed, task))[:count])
    return frozenset(held)


def _count(num_tasks: int, config: DatasetConfig) -> int:
    if config.validation_share:
        return max(1, round(config.validation_share * num_tasks))
    return config.validation_tasks


def _rank(seed: int, task_id: str) -> bytes:
    return hashlib.sha256(f"validation/{seed}/{task_id}".encode()).digest()


def held_out_lines(name: str, summary: Mapping[str, Any]) -> list[str]:
    """What a dataset is validated on, as its summary says; none where nothing is held out."""
    if "num_validation" not in summary:
        return []
    dropped = ", ".join(f"{n} {reason}" for reason, n in summary["validation_dropped"].items())
    return [
        f"{name}: {summary['num_validation']} examples held out (dropped: {dropped or 'none'}),"
        f" {summary['num_validation_tokens']:,} tokens in the loss,"
        f" {summary['num_validation_error_tokens']:,} masked error tokens"
    ]


def of_tasks(
    trajectories: Iterable[Trajectory], held: Collection[str], *, is_held: bool
) -> Iterator[Trajectory]:
    """The trajectories of held-out tasks, or those of the others, one by one."""
    return (t for t in trajectories if (t.task.task_id in held) == is_held)
