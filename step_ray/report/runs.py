"""Several runs of one line that differ in their seed, as one result: every arm over runs.

Takes the outcomes of each run, gives rows, rich tables, an HTML page and plain data for JSON. Two
intervals stand beside each other, because they answer two questions: over runs, whether another
training would come out the same; over tasks, whether these very models differ on other tasks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from step_ray.errors import DataError
from step_ray.evaluation.stats import (
    PairedDifference,
    mean_by_task,
    mean_interval,
    paired_difference,
)
from step_ray.report.charts import Forest, forest
from step_ray.report.page import environment
from step_ray.report.results import BASE, GOLDEN_ONLY, difference, plain, rate, write_text
from step_ray.types import Interval

REFERENCES = (BASE, GOLDEN_ONLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcomes:
    """One run."""

    name: str
    seed: int
    outcomes: Mapping[str, Mapping[str, float]]
    """Arm -> task id -> success or score, averaged over the seeds of the evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceOverRuns:
    """How much better an arm is than another."""

    by_run: Mapping[str, float]
    """Run -> mean over its tasks."""
    over_runs: Interval
    """Mean of `by_run` with its Student-t interval: runs are the units."""
    over_tasks: PairedDifference
    """Outcomes averaged over runs first: tasks are the units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmOverRuns:
    """One arm."""

    arm: str
    by_run: Mapping[str, float]
    """Run -> mean over its tasks."""
    over_runs: Interval
    against: Mapping[str, DifferenceOverRuns]
    """Reference -> difference to it; without the arm itself."""


def over_runs(runs: Sequence[RunOutcomes], confidence: float) -> list[ArmOverRuns]:
    """Every arm that all runs have, in the order of the first run.

    Raises:
        DataError: fewer than two runs, two of one name, or no arm that all have.
    """
    names = [run.name for run in runs]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise DataError(f"compare: runs {names} are not two or more different ones; give others")
    arms = [arm for arm in runs[0].outcomes if all(arm in run.outcomes for run in runs)]
    if not arms:
        raise DataError(f"compare: no arm was evaluated in all of {names}; finish the runs")
    return [_arm(arm, arms, runs, confidence) for arm in arms]


def _arm(
    arm: str, arms: Sequence[str], runs: Sequence[RunOutcomes], confidence: float
) -> ArmOverRuns:
    rates = {run.name: _mean(run.outcomes[arm]) for run in runs}
    return ArmOverRuns(
        arm=arm,
        by_run=rates,
        over_runs=mean_interval(list(rates.values()), confidence),
        against={
            other: _difference(arm, other, runs, confidence)
            for other in REFERENCES
            if other in arms and other != arm
        },
    )


def _difference(
    arm: str, other: str, runs: Sequence[RunOutcomes], confidence: float
) -> DifferenceOverRuns:
    by_run = {
        run.name: paired_difference(run.outcomes[arm], run.outcomes[other], confidence).estimate
        for run in runs
    }
    mine, theirs = (
        mean_by_task(item for run in runs for item in run.outcomes[name].items())
        for name in (arm, other)
    )
    return DifferenceOverRuns(
        by_run=by_run,
        over_runs=mean_interval(list(by_run.values()), confidence),
        over_tasks=paired_difference(mine, theirs, confidence),
    )


def _mean(outcomes: Mapping[str, float]) -> float:
    return sum(outcomes.values()) / len(outcomes)


def runs_table(title: str, rows: Sequence[ArmOverRuns]) -> Table:
    """The rows for the terminal, in percent and percentage points."""
    table = Table(title=f"{title}, over runs", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for name in ("each run %", "mean %", *(f"vs {other}" for other in REFERENCES)):
        table.add_column(name, justify="right")
    for row in rows:
        each = " ".join(f"{100 * value:.0f}" for value in row.by_run.values())
        cells = [row.arm, each, "\n".join(rate(row.over_runs))]
        cells += ["\n".join(_shown(row.against.get(other))) for other in REFERENCES]
        table.add_row(*map(Text, cells))
    return table


def _shown(compared: DifferenceOverRuns | None) -> tuple[str, ...]:
    """Over runs: the difference and its interval; over tasks: interval and p-value."""
    if compared is None:
        return ("",)
    interval = compared.over_runs
    low, high = 100 * interval.low, 100 * interval.high
    _, over_tasks, p_value = difference(compared.over_tasks)
    return (
        f"{100 * interval.estimate:+.1f}",
        f"runs [{low:+.1f}, {high:+.1f}]",
        f"tasks {over_tasks} {p_value}",
    )


def differences_plot(rows: Sequence[ArmOverRuns]) -> Forest | None:
    """All differences over runs as a forest plot."""
    return forest(
        [
            (f"{row.arm} vs {other}", compared.over_runs)
            for row in rows
            for other, compared in row.against.items()
        ]
    )


def write_runs(
    path: Path, tables: Mapping[str, Sequence[ArmOverRuns]], seeds: Mapping[str, int]
) -> None:
    """Write the page, and the same numbers beside it as JSON, each whole or not at all.

    Args:
        path: HTML file.
        tables: what is compared -> its rows.
        seeds: run -> its seed.
    """
    page = environment().get_template("runs.html.j2")
    plots = {title: differences_plot(rows) for title, rows in tables.items()}
    html = page.render(tables=tables, plots=plots, seeds=seeds, references=REFERENCES)
    write_text(path, html)
    numbers = {title: [plain(asdict(row)) for row in rows] for title, rows in tables.items()}
    write_text(path.with_suffix(".json"), json.dumps(numbers, indent=2) + "\n")
