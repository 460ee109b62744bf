"""The report of a run: one self-contained HTML file, a terminal table, results.json and .csv.

Takes plain data (`ReportInputs`) and gives files. It reads no run folder, and never invents a
number: what was not measured is shown as "not run". All text is escaped and the page forbids
scripts and requests, because observations and answers of models are untrusted.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from step_ray.errors import DataError
from step_ray.stats import PairedDifference, paired_difference, success_interval
from step_ray.types import EvalReport, Interval, Step, StepKind, Trajectory

BASE = "base"
"""The base agent: golden data of U1 only."""
GOLDEN_ONLY = "golden_only"
"""The control with as many golden trajectories as the method uses in all."""
NOT_RUN = "not run"
RUN_FACTS = ("name", "created", "config_digest", "git_revision", "versions", "machine")
"""Keys of `ReportInputs.run` that the header always shows, recorded or not; others follow."""
NUM_EXAMPLES_SHOWN = 3
CHART_WIDTH, CHART_HEIGHT = 960, 300
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 56, 12, 12, 40

Comparison: TypeAlias = PairedDifference | str
"""A paired difference, or the words that stand in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInputs:
    """All that a report shows; whatever is left out is shown as not run."""

    run: Mapping[str, Any]
    """Facts for the header, see RUN_FACTS; values are text, numbers or mappings of them."""
    config: Mapping[str, Any]
    """The resolved configuration; `arms` and `dataset.mask_suboptimal` are read."""
    evals: Sequence[EvalReport] = ()
    """One per model; `model` is the name of the arm, `base` that of the base agent."""
    outcomes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Arm -> task id -> success, averaged over seeds (stats.success_by_task)."""
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Arm -> metric lines; those with `step` (optimizer steps) and `loss` are drawn."""
    collection: Sequence[Trajectory] = ()
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arm -> dataset summary. All scalars are shown; the cost table reads `num_trajectories` and
    `num_trained_tokens`."""
    task_types: Mapping[str, str] = field(default_factory=dict)
    """Evaluation task id -> task type, for the counts of the table by task type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """One line of the results."""

    arm: str
    report: EvalReport | None
    vs_base: Comparison
    vs_golden_only: Comparison


def write_report(path: str | Path, inputs: ReportInputs) -> None:
    """Write the report as one HTML file, whole or not at all.

    Raises:
        DataError: two evaluations of one arm.
    """
    rows = results_rows(inputs)
    page = _environment().get_template("report.html.j2")
    html = page.render(
        facts=run_facts(inputs.run),
        rows=rows,
        confidence=next((row.report.success_rate.confidence for row in rows if row.report), 0.95),
        by_type=_by_task_type(rows, inputs.task_types),
        charts=[loss_chart(inputs.training, log_y=log_y) for log_y in (True, False)],
        collection=collection_summary(inputs.collection),
        datasets=_dataset_table(inputs.datasets),
        costs=cost_table(inputs),
        examples=[example_view(t, _mask_suboptimal(inputs)) for t in examples(inputs.collection)],
        config_yaml=yaml.safe_dump(_finite(dict(inputs.config)), sort_keys=False),
    )
    _write_text(Path(path), html)


def write_results(folder: str | Path, inputs: ReportInputs) -> None:
    """Write results.json (all numbers, nested) and results.csv (one flat line per arm).

    Numbers that were not measured, or have no bound, are null and empty.

    Raises:
        DataError: two evaluations of one arm.
    """
    rows = results_rows(inputs)
    records = [_finite(asdict(row)) for row in rows]
    _write_text(Path(folder) / "results.json", json.dumps(records, indent=2) + "\n")
    lines = [_csv_record(record) for record in records]
    names = list(dict.fromkeys(name for line in lines for name in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    _write_text(Path(folder) / "results.csv", buffer.getvalue())


def results_table(inputs: ReportInputs) -> Table:
    """The results for the terminal: the same numbers as the report.

    Raises:
        DataError: two evaluations of one arm.
    """
    table = Table(title="Success rate and differences in percentage points")
    table.add_column("arm")
    numbers = ("tasks", "success %", "vs base", "vs golden_only", "reward", "steps", "no-ops")
    for name in (*numbers, "truncated", "errors"):
        table.add_column(name, justify="right")
    for row in results_rows(inputs):
        comparisons = [
            " ".join(filter(None, difference(c))) for c in (row.vs_base, row.vs_golden_only)
        ]
        cells = [" ".join(filter(None, rate(row.report and row.report.success_rate)))]
        if (report := row.report) is None:
            cells = [NOT_RUN, *cells, *comparisons, *[NOT_RUN] * 5]
        else:
            reward, steps = f"{report.mean_reward.estimate:.3f}", f"{report.mean_steps:.1f}"
            cells = [str(report.num_tasks), *cells, *comparisons, reward, steps]
            cells += [f"{report.mean_env_noops:.2f}"]
            cells += [str(report.num_truncated), str(report.num_errors)]
        table.add_row(*(Text(cell) for cell in (row.arm, *cells)))
    return table


def results_rows(inputs: ReportInputs) -> list[ResultRow]:
    """Base agent, the configured arms in their order, then any other evaluated model.

    Raises:
        DataError: two evaluations of one arm.
    """
    counts = Counter(report.model for report in inputs.evals)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"report: {twice[0]!r} has {counts[twice[0]]} evaluations; give one")
    reports = {report.model: report for report in inputs.evals}
    return [
        ResultRow(
            arm=arm,
            report=reports.get(arm),
            vs_base=_compare(inputs, reports.get(arm), BASE),
            vs_golden_only=_compare(inputs, reports.get(arm), GOLDEN_ONLY),
        )
        for arm in dict.fromkeys([BASE, *inputs.config.get("arms", {}), *reports])
    ]


def _compare(inputs: ReportInputs, report: EvalReport | None, other: str) -> Comparison:
    if report is not None and report.model == other:
        return "reference"
    mine, theirs = (inputs.outcomes.get(arm) for arm in (report.model if report else "", other))
    if report is None or not mine or not theirs:
        return NOT_RUN
    try:
        return paired_difference(mine, theirs, report.success_rate.confidence)
    except DataError as exc:
        return f"not comparable ({exc})"


def rate(interval: Interval | None) -> tuple[str, str]:
    """A proportion in percent and its interval, as shown."""
    if interval is None:
        return NOT_RUN, ""
    return f"{100 * interval.estimate:.1f}", f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def difference(comparison: Comparison) -> tuple[str, str]:
    """A paired difference in percentage points, and its interval and p-value, as shown."""
    if isinstance(comparison, str):
        return comparison, ""
    low, high = 100 * comparison.low, 100 * comparison.high
    p_value = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.3f}"
    return f"{100 * comparison.estimate:+.1f}", f"[{low:+.1f}, {high:+.1f}] {p_value}"


def count(number: float | None) -> str:
    """A count with thousands separators; None was not measured."""
    return NOT_RUN if number is None else f"{number:,.10g}"


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of each fact of the header; a mapping becomes `key value, key value`."""
    facts = []
    for key in dict.fromkeys([*RUN_FACTS, *run]):
        value = run.get(key, "not recorded")
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        facts.append((key.replace("_", " "), str(value)))
    return facts


def _by_task_type(rows: Sequence[ResultRow], task_types: Mapping[str, str]) -> dict[str, Any]:
    run = [row.report for row in rows if row.report]
    counts = Counter(task_types.values())
    names = sorted({name for report in run for name in report.by_task_type})
    return {
        "arms": [report.model for report in run],
        "lines": [
            (name or "(none)", counts.get(name), [r.by_task_type.get(name) for r in run])
            for name in names
        ],
    }


def _dataset_table(datasets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(
        key for summary in datasets.values() for key, value in summary.items() if _scalar(value)
    )
    lines = [(key, [summary.get(key) for summary in datasets.values()]) for key in keys]
    return {"arms": list(datasets), "lines": lines}


def _scalar(value: Any) -> bool:
    return isinstance(value, int | float | str) or value is None


def cost_table(inputs: ReportInputs) -> list[tuple[str, list[float | None]]]:
    """Per arm: trajectories, trained tokens (one epoch), teacher calls and tokens, env steps.

    An arm with self-reflected data pays for the whole collection, dropped episodes included.
    """
    usages = [trajectory.usage for trajectory in inputs.collection]
    collected: list[float | None] = [None, None, None]
    if usages:
        tokens = sum(u.teacher_prompt_tokens + u.teacher_completion_tokens for u in usages)
        calls, steps = sum(u.teacher_calls for u in usages), sum(u.env_steps for u in usages)
        collected = [calls, tokens, steps]
    arms = inputs.config.get("arms", {})
    table: list[tuple[str, list[float | None]]] = []
    for arm in dict.fromkeys([BASE, *arms, *inputs.datasets]):
        data = inputs.datasets.get(arm, {})
        reflected = arms.get(arm, {}).get("self_reflected", False)
        size = [data.get("num_trajectories"), data.get("num_trained_tokens")]
        table.append((arm, size + (collected if reflected else [0, 0, 0])))
    return table


def collection_summary(collection: Sequence[Trajectory]) -> dict[str, Any] | None:
    """Counts over the episodes of the collection; None when there are none."""
    if not collection:
        return None
    steps = [step for trajectory in collection for step in trajectory.steps]
    verdicts = [step.verdict for step in steps if step.verdict]
    corrections = [_num_corrections(trajectory) for trajectory in collection]
    errors = Counter(v.error_type or "(none)" for v in verdicts if v.label != "good")
    calls = sum(trajectory.usage.teacher_calls for trajectory in collection)
    return {
        "facts": [
            ("episodes", count(len(collection))),
            ("successful", count(sum(trajectory.success for trajectory in collection))),
            ("success rate", " % ".join(rate(success_interval(collection, 0.95)))),
            ("steps", count(len(steps))),
            ("teacher calls", count(calls)),
            ("corrections", count(sum(corrections))),
            ("corrections per episode", f"{sum(corrections) / len(collection):.2f}"),
        ],
        "counts": {
            "Stop reasons": Counter(t.stop_reason.value for t in collection).most_common(),
            "Verdicts": Counter(v.label.value for v in verdicts).most_common(),
            "Error types": errors.most_common(),
            "Corrections per episode": sorted(Counter(corrections).items()),
        },
    }


def _num_corrections(trajectory: Trajectory) -> int:
    return sum(step.kind is StepKind.CORRECTION for step in trajectory.steps)


def examples(collection: Sequence[Trajectory]) -> list[Trajectory]:
    """Trajectories with an error and a correction: solved and short ones first, types mixed."""
    mended = [
        trajectory
        for trajectory in collection
        if {StepKind.ERROR, StepKind.CORRECTION} <= {step.kind for step in trajectory.steps}
    ]
    mended.sort(key=lambda t: (not t.success, len(t.steps), t.trajectory_id))
    one_per_type = {t.task.task_type: t for t in reversed(mended)}
    order = {t.trajectory_id: t for t in [*reversed(one_per_type.values()), *mended]}
    return list(order.values())[:NUM_EXAMPLES_SHOWN]


def _mask_suboptimal(inputs: ReportInputs) -> bool:
    return bool(inputs.config.get("dataset", {}).get("mask_suboptimal", True))


def example_view(trajectory: Trajectory, mask_suboptimal: bool) -> dict[str, Any]:
    """A trajectory for the chat view: each step with its trained flag and reflection apart."""
    masked = {StepKind.ERROR, StepKind.SUBOPTIMAL} if mask_suboptimal else {StepKind.ERROR}
    steps = [
        {"step": step, "trained": step.kind not in masked, "parts": _split_reflection(step)}
        for step in trajectory.steps
    ]
    return {"trajectory": trajectory, "steps": steps}


def _split_reflection(step: Step) -> tuple[str, str, str]:
    """Text before, of and after the reflection."""
    if not step.reflection or step.reflection not in step.text:
        return step.text, "", ""
    return step.text.partition(step.reflection)


def loss_chart(
    training: Mapping[str, Sequence[Mapping[str, Any]]], *, log_y: bool
) -> dict[str, Any] | None:
    """Training loss over optimizer steps as coordinates for an SVG; None without points.

    Each arm has its raw line and a running mean over 1/40 of its points. Losses that cannot be
    drawn (not finite, or not positive on a log axis) are counted in `num_left_out`.
    """
    lines = {arm: _points(metrics) for arm, metrics in training.items()}
    drawn = {arm: p[np.isfinite(p[:, 1]) & ((p[:, 1] > 0) | (not log_y))] for arm, p in lines.items()}
    points = np.concatenate([np.empty((0, 2)), *drawn.values()])
    if not len(points):
        return None
    x_range, y_range = (0.0, float(points[:, 0].max()) or 1.0), _padded(points[:, 1], log_y)
    xs = _scale(x_range, CHART_LEFT, CHART_WIDTH - CHART_RIGHT)
    ys = _scale(y_range, CHART_HEIGHT - CHART_BOTTOM, CHART_TOP, log_y)
    return {
        "size": (CHART_WIDTH, CHART_HEIGHT),
        "plot": (CHART_LEFT, CHART_TOP, CHART_WIDTH - CHART_RIGHT, CHART_HEIGHT - CHART_BOTTOM),
        "log_y": log_y,
        "x_ticks": [(round(float(xs(t)), 1), f"{t:,g}") for t in linear_ticks(*x_range)],
        "y_ticks": [(round(float(ys(t)), 1), f"{t:g}") for t in _y_ticks(*y_range, log_y)],
        "lines": [
            {"arm": arm, "last": p[-1, 1], "raw": _path(xs, ys, p), "mean": _path(xs, ys, _smooth(p))}
            for arm, p in drawn.items()
            if len(p)
        ],
        "num_left_out": sum(map(len, lines.values())) - len(points),
    }
