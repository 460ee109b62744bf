"""`step-ray compare`: finished runs of one config with other seeds, read and put side by side.

Takes run folders, gives tables and an HTML page. It refuses runs that differ in more than name and
seed: their mean would be of nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from step_ray.config import BASE, RunConfig, load_config
from step_ray.errors import DataError
from step_ray.evaluation.scores import SCORES
from step_ray.evaluation.stats import score_by_task, success_by_task
from step_ray.report.runs import RunOutcomes, over_runs, runs_table, write_runs
from step_ray.store import read_trajectories
from step_ray.types import Trajectory

FREE = {"name", "seed", "output_dir", "ray", "serve"}
"""Sections in which runs may differ: who they are and where they ran."""
Measure: TypeAlias = Callable[[Sequence[Trajectory]], dict[str, float]]
"""Trajectories of an arm -> task id -> value."""
SUCCESS = "Success rate"
SCORE = "Score, in percent of the full score"


def compare(folders: Sequence[Path], out: Path, console: Console) -> None:
    """Print the arms over all runs and write them to `out` and, as JSON, beside it.

    They are compared in their success; in their score, where it says more; and where there are
    several splits, in the success on each.

    Raises:
        ConfigError: a folder holds no config.yaml of a run.
        DataError: the runs cannot be put together.
    """
    configs = [load_config(folder / "config.yaml") for folder in folders]
    for config, folder in zip(configs[1:], folders[1:], strict=True):
        _refuse_other_settings(configs[0], config, folders[0], folder)
    played = [_played(config, folder) for config, folder in zip(configs, folders, strict=True)]
    tables = {}
    for title, outcomes in _measures(configs[0], played).items():
        runs = [
            RunOutcomes(
                name=folder.name,
                seed=config.seed,
                outcomes={arm: outcomes(episodes) for arm, episodes in by_arm.items()},
            )
            for folder, config, by_arm in zip(folders, configs, played, strict=True)
        ]
        tables[title] = over_runs(runs, configs[0].evaluate.confidence)
        console.print(runs_table(title, tables[title]))
    write_runs(out, tables, {f.name: c.seed for f, c in zip(folders, configs, strict=True)})
    console.print(str(out), soft_wrap=True)


def _refuse_other_settings(a: RunConfig, b: RunConfig, of_a: Path, of_b: Path) -> None:
    for key in RunConfig.model_fields:
        if key not in FREE and getattr(a, key) != getattr(b, key):
            raise DataError(
                f"compare: {str(of_a)!r} and {str(of_b)!r} differ in {key}; give runs that differ"
                " in their seed only"
            )


def _played(config: RunConfig, folder: Path) -> dict[str, list[Trajectory]]:
    """Arm -> its evaluation; arms without one are left out."""
    paths = {arm: folder / "evaluate" / arm for arm in (BASE, *config.arms)}
    return {arm: read_trajectories(path) for arm, path in paths.items() if path.is_dir()}


def _measures(
    config: RunConfig, played: Sequence[Mapping[str, Sequence[Trajectory]]]
) -> dict[str, Measure]:
    """What runs are compared in, by title."""
    score = SCORES[config.env.scoring]
    measures: dict[str, Measure] = {SUCCESS: success_by_task}
    episodes = (t for by_arm in played for arm in by_arm.values() for t in arm)
    if any(abs(score(t) - t.success) > 1e-9 for t in episodes):
        measures[SCORE] = partial(score_by_task, score=score)
    splits = config.tasks.eval_splits
    if len(splits) > 1:
        measures |= {f"{SUCCESS}, {split}": partial(_success_on, split) for split in splits}
    return measures


def _success_on(split: str, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    return success_by_task([t for t in trajectories if t.task.split == split])
