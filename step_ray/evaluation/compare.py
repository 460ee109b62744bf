"""`step-ray compare`: finished runs of one config with other seeds, read and put side by side.

Takes run folders, gives a table and an HTML page. It refuses runs that differ in more than name and
seed: their mean would be of nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from step_ray.config import BASE, RunConfig, load_config
from step_ray.errors import DataError
from step_ray.evaluation.stats import success_by_task
from step_ray.report.runs import RunOutcomes, over_runs, runs_table, write_runs
from step_ray.store import iter_trajectories

FREE = {"name", "seed", "output_dir", "ray", "serve"}
"""Sections in which runs may differ: who they are and where they ran."""


def compare(folders: Sequence[Path], out: Path, console: Console) -> None:
    """Print the arms over all runs and write them to `out` and, as JSON, beside it.

    Raises:
        ConfigError: a folder holds no config.yaml of a run.
        DataError: the runs cannot be put together.
    """
    configs = [load_config(folder / "config.yaml") for folder in folders]
    for config, folder in zip(configs[1:], folders[1:], strict=True):
        _refuse_other_settings(configs[0], config, folders[0], folder)
    runs = [_outcomes(config, folder) for config, folder in zip(configs, folders, strict=True)]
    rows = over_runs(runs, configs[0].evaluate.confidence)
    write_runs(out, rows, runs)
    console.print(runs_table(rows))
    console.print(str(out), soft_wrap=True)


def _refuse_other_settings(a: RunConfig, b: RunConfig, of_a: Path, of_b: Path) -> None:
    for key in RunConfig.model_fields:
        if key not in FREE and getattr(a, key) != getattr(b, key):
            raise DataError(
                f"compare: {str(of_a)!r} and {str(of_b)!r} differ in {key}; give runs that differ"
                " in their seed only"
            )


def _outcomes(config: RunConfig, folder: Path) -> RunOutcomes:
    played = {arm: folder / "evaluate" / arm for arm in (BASE, *config.arms)}
    return RunOutcomes(
        name=folder.name,
        seed=config.seed,
        outcomes={
            arm: success_by_task(iter_trajectories(path))
            for arm, path in played.items()
            if path.is_dir()
        },
    )
