"""The results of a run: one row per arm, compared pairwise, for the terminal and as files.

Takes `ReportInputs`, gives rows, a rich table, results.json and results.csv; the HTML page shows
the same rows. It estimates nothing itself (see stats.py).
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

from step_ray.errors import DataError
from step_ray.evaluation.stats import PairedDifference, paired_difference
from step_ray.report.collection import CollectionCounts
from step_ray.report.cost import ArmCost, arm_cost, collection_cost
from step_ray.types import EvalReport, Interval

BASE = "base"
"""The base agent, trained on the golden data of U1."""
GOLDEN_ONLY = "golden_only"
"""The control: golden data only, as many trajectories."""
NOT_RUN = "not run"
COLUMNS = ("success %", "vs base", "vs golden_only", "score", "steps", "error")
"""Columns of the terminal table after the arm: what fits 80 characters; the report has more."""

NOT_FLAT = {
    *("stop_reasons", "by_task_type", "reward_by_task_type", "by_split", "reward_by_split"),
    *("model", "splits"),
}
"""Fields of an evaluation that have no place in a line of the CSV."""
Comparison: TypeAlias = PairedDifference | str
"""A paired difference, or the words that stand in its place."""


class EpisodeCounts(NamedTuple):
    """How much of a run its episode viewer holds."""

    num_shown: int
    num_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """All that a report shows; whatever is left out is shown as not run."""

    run: Mapping[str, Any]
    """Facts for the header, see page.RUN_FACTS; values are text, numbers or mappings of them."""
    config: Mapping[str, Any]
    """The resolved configuration; `arms` and `dataset.mask_suboptimal` are read."""
    evals: Sequence[EvalReport] = ()
    """One per model; `model` is the name of the arm, `base` that of the base agent."""
    outcomes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Arm -> task id -> success, averaged over seeds (stats.success_by_task)."""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Arm -> task id -> the score that `EvalReport.mean_reward` is the mean of, averaged over
    seeds."""
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Arm -> metric lines; those with `step` (optimizer steps) and `loss` are drawn, those with
    `validation_loss` are in the table of validations."""
    collection: CollectionCounts = field(default_factory=CollectionCounts)
    """All episodes of the collection, kept or not."""
    collection_state: Mapping[str, Any] = field(default_factory=dict)
    """The record of its stage: `status`, and the `summary` with what was spent in all and what a
    budget left undone. Empty: never begun."""
    own: CollectionCounts = field(default_factory=CollectionCounts)
    """All rollouts of the base agent alone, kept or not."""
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arm -> fields of its dataset.DatasetSummary. All are shown; the cost table reads
    `num_examples` and `num_trained_tokens`."""
    task_types: Mapping[str, str] = field(default_factory=dict)
    """Evaluation task id -> task type, for the number of tasks of each type."""
    splits: Mapping[str, str] = field(default_factory=dict)
    """Evaluation task id -> split; several splits are compared one by one, too."""
    episodes: EpisodeCounts | None = None
    """Of the viewer beside the page (report.episodes); None: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """An arm on the tasks of one split."""

    success_rate: Interval
    vs_base: Comparison
    vs_golden_only: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One line of the results."""

    arm: str
    report: EvalReport | None
    vs_base: Comparison
    vs_golden_only: Comparison
    score_vs_base: Comparison
    """As the two above, of the score in place of the success."""
    score_vs_golden_only: Comparison
    cost: ArmCost
    splits: Mapping[str, SplitResult] = field(default_factory=dict)
    """Split -> the arm on its tasks; empty where all tasks are of one split."""


def results_rows(inputs: ReportInputs) -> list[ResultRow]:
    """Base agent, the configured arms in their order, then any other evaluated model.

    Raises:
        DataError: two evaluations of one arm.
    """
    counts = Counter(report.model for report in inputs.evals)
    twice = [name for name, number in counts.items() if number > 1]
    if twice:
        raise DataError(f"report: {twice[0]!r} has {counts[twice[0]]} evaluations; give one")
    reports = {report.model: report for report in inputs.evals}
    return [
        ResultRow(
            arm=arm,
            report=reports.get(arm),
            vs_base=_compare(inputs.outcomes, reports.get(arm), BASE),
            vs_golden_only=_compare(inputs.outcomes, reports.get(arm), GOLDEN_ONLY),
            score_vs_base=_compare(inputs.scores, reports.get(arm), BASE),
            score_vs_golden_only=_compare(inputs.scores, reports.get(arm), GOLDEN_ONLY),
            cost=costs(inputs, arm),
            splits=_splits(inputs, reports.get(arm)),
        )
        for arm in dict.fromkeys([BASE, *inputs.config.get("arms", {}), *reports])
    ]


def _splits(inputs: ReportInputs, report: EvalReport | None) -> dict[str, SplitResult]:
    if report is None or len(report.by_split) < 2:
        return {}
    results = {}
    for split, interval in report.by_split.items():
        of_split = {
            arm: {task: x for task, x in by_task.items() if inputs.splits.get(task) == split}
            for arm, by_task in inputs.outcomes.items()
        }
        results[split] = SplitResult(
            success_rate=interval,
            vs_base=_compare(of_split, report, BASE),
            vs_golden_only=_compare(of_split, report, GOLDEN_ONLY),
        )
    return results


def costs(inputs: ReportInputs, arm: str) -> ArmCost:
    """What an arm was made from."""
    recipes = {BASE: {}, **inputs.config.get("arms", {})}
    played = [collection_cost(counts) for counts in (inputs.collection, inputs.own)]
    return arm_cost(recipes.get(arm), inputs.datasets.get(arm, {}), *played)


def _compare(
    by_arm: Mapping[str, Mapping[str, float]], report: EvalReport | None, other: str
) -> Comparison:
    if report is None:
        return NOT_RUN
    if report.model == other:
        return "reference"
    mine, theirs = by_arm.get(report.model), by_arm.get(other)
    if not mine or not theirs:
        return NOT_RUN
    try:
        return paired_difference(mine, theirs, report.success_rate.confidence)
    except DataError as exc:
        return f"not comparable ({exc})"


def results_table(inputs: ReportInputs) -> Table:
    """The results for the terminal: the numbers of the report that matter most.

    Raises:
        DataError: two evaluations of one arm.
    """
    table = _table("Success rate and paired differences in percentage points")
    table.add_column("arm", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in results_rows(inputs):
        # Text, not str: rich would read markup in a name.
        table.add_row(*(Text(cell) for cell in (row.arm, *_cells(row))))
    return table


def splits_table(inputs: ReportInputs) -> Table | None:
    """The results on each split for the terminal; None where there is one only."""
    rows = [(row.arm, *item) for row in results_rows(inputs) for item in row.splits.items()]
    if not rows:
        return None
    table = _table("On each split")
    for name in ("arm", "split", *COLUMNS[:3]):
        justify: Literal["left", "right"] = "left" if name in ("arm", "split") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for arm, split, result in rows:
        compared = [difference(c) for c in (result.vs_base, result.vs_golden_only)]
        cells = [_joined(texts) for texts in (rate(result.success_rate), *compared)]
        table.add_row(*map(Text, (arm, split, *cells)))
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )


def _cells(row: ResultRow) -> list[str]:
    compared = [_joined(difference(c)) for c in (row.vs_base, row.vs_golden_only)]
    if row.report is None:
        return [NOT_RUN, *compared, *[NOT_RUN] * 3]
    eto = "" if row.report.scoring == "final" else f" ({row.report.scoring})"
    return [
        _joined(rate(row.report.success_rate)),
        *compared,
        f"{row.report.mean_reward.estimate:.3f}{eto}",
        f"{row.report.mean_steps:.1f}",
        count(row.report.num_errors),
    ]


def _joined(texts: tuple[str, ...]) -> str:
    return "\n".join(text for text in texts if text)


def rate(interval: Interval | None) -> tuple[str, str]:
    """A proportion in percent and its interval, as shown."""
    if interval is None:
        return NOT_RUN, ""
    return (
        f"{100 * interval.estimate:.1f}",
        f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]",
    )


def difference(comparison: Comparison) -> tuple[str, ...]:
    """A paired difference in percentage points, its interval and its p-value, as shown."""
    if isinstance(comparison, str):
        return comparison, ""
    low, high = 100 * comparison.low, 100 * comparison.high
    p_value = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.3f}"
    return f"{100 * comparison.estimate:+.1f}", f"[{low:+.1f}, {high:+.1f}]", p_value


def count(value: Any) -> str:
    """A number with thousands separators; None was not measured; anything else as it is."""
    if value is None:
        return NOT_RUN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def write_results(folder: str | Path, inputs: ReportInputs) -> None:
    """Write results.json (all numbers, nested), results.csv (one flat line per arm) and
    collection.json (what the collection cost, and whether all of it was played).

    The CSV leaves out stop reasons and task types. A number that was not measured, or a bound
    that does not exist, is null in the one and empty in the other.

    Raises:
        DataError: two evaluations of one arm.
    """
    rows = [plain(asdict(row)) for row in results_rows(inputs)]
    write_text(Path(folder) / "results.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    record = plain(
        {
            **inputs.collection_state,
            "cost_of_what_counts": asdict(collection_cost(inputs.collection)),
        }
    )
    write_text(Path(folder) / "collection.json", json.dumps(record, indent=2) + "\n")
    lines = [_flat(row) for row in rows]
    buffer = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(buffer, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(Path(folder) / "results.csv", buffer.getvalue())


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by `_`; those of the evaluation itself stand alone."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if name in NOT_FLAT or (name, value) == ("report", None):
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, "" if name == "report" else f"{prefix}{name}_")
        else:
            flat[prefix + name] = value
    return flat


def plain(value: Any) -> Any:
    """The value in types that JSON and YAML know; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, bool | int | None) else str(value)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    temp.write_text(text, encoding="utf-8", errors="backslashreplace")
    temp.replace(path)
