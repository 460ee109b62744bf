"""The HTML page: gathers what each section shows and renders the template.

Takes `ReportInputs`, writes one file that needs nothing else. All text is escaped, and the page
itself forbids scripts and requests, because observations and answers of models are untrusted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from step_ray.report import charts
from step_ray.report.results import (
    BASE,
    GOLDEN_ONLY,
    NOT_RUN,
    ReportInputs,
    ResultRow,
    count,
    difference,
    plain,
    rate,
    results_rows,
    write_text,
)
from step_ray.stats import PairedDifference, success_interval
from step_ray.types import Interval, Step, StepKind, Trajectory, VerdictLabel

RUN_FACTS = ("name", "created", "config_digest", "git_revision", "versions", "machine")
"""Keys of `ReportInputs.run` that the header always shows, recorded or not; others follow."""
NUM_EXAMPLES_SHOWN = 3
DEFAULT_CONFIDENCE = 0.95

Lines: TypeAlias = list[tuple[str, list[Any]]]
"""A table: label and cells of each line."""


def write_report(path: str | Path, inputs: ReportInputs) -> None:
    """Write the report as one HTML file, whole or not at all.

    Raises:
        DataError: two evaluations of one arm.
    """
    rows = results_rows(inputs)
    confidences = [row.report.success_rate.confidence for row in rows if row.report]
    confidence = confidences[0] if confidences else DEFAULT_CONFIDENCE
    mask_suboptimal = inputs.config.get("dataset", {}).get("mask_suboptimal", True)
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            facts=run_facts(inputs.run),
            config_yaml=yaml.safe_dump(plain(inputs.config), sort_keys=False, allow_unicode=True),
            rows=rows,
            confidence=confidence,
            types=_by_task_type(rows, inputs.task_types),
            behaviour=_behaviour(rows),
            forest=charts.forest(differences(rows)),
            chart_log=charts.loss_chart(inputs.training, log_y=True),
            chart_linear=charts.loss_chart(inputs.training, log_y=False),
            collection=collection_summary(inputs.collection, confidence),
            datasets=inputs.datasets,
            dataset_lines=dataset_lines(inputs.datasets),
            costs=cost_lines(inputs),
            episodes=inputs.episodes,
            examples=[example_view(t, mask_suboptimal) for t in pick_examples(inputs.collection)],
        )
    )
    write_text(Path(path), html)


def environment() -> Environment:
    """The templates of reports; everything is escaped."""
    # The template does not end in .html, so escaping has to be asked for.
    environment = Environment(
        loader=PackageLoader("step_ray"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": rate, "difference": difference, "count": count}
    environment.globals |= {"charts": charts, "NOT_RUN": NOT_RUN}
    return environment


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
    """Arms that were run, and per task type its number of tasks and each arm's interval."""
    run = [row.report for row in rows if row.report]
    numbers = Counter(task_types.values())
    names = sorted({name for report in run for name in report.by_task_type})
    return {
        "arms": [report.model for report in run],
        "lines": [
            (name or "(none)", numbers.get(name), [r.by_task_type.get(name) for r in run])
            for name in names
        ],
    }


def differences(rows: Sequence[ResultRow]) -> list[tuple[str, Interval]]:
    """Label and interval of every paired difference that could be made."""
    pairs = [(row.arm, BASE, row.vs_base) for row in rows]
    # base against golden_only is the mirror of what is there already
    pairs += [(row.arm, GOLDEN_ONLY, row.vs_golden_only) for row in rows if row.arm != BASE]
    return [
        (f"{arm} vs {other}", Interval(estimate=d.estimate, low=d.low, high=d.high))
        for arm, other, d in pairs
        if isinstance(d, PairedDifference)
    ]


def _behaviour(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Arms that were run, and per measure each arm's interval (None: it has none)."""
    run = [row.report for row in rows if row.report]
    names = dict.fromkeys(name for report in run for name in report.behaviour)
    return {
        "arms": [report.model for report in run],
        "lines": [
            (name.replace("_", " "), [report.behaviour.get(name) for report in run])
            for name in names
        ],
    }


def dataset_lines(datasets: Mapping[str, Mapping[str, Any]]) -> Lines:
    """Every number of the dataset summaries, nested ones too: label, and its value per arm."""
    flat = [_labelled(summary) for summary in datasets.values()]
    labels = dict.fromkeys(label for summary in flat for label in summary)
    return [(label, [summary.get(label) for summary in flat]) for label in labels]


def _labelled(summary: Mapping[str, Any]) -> dict[str, Any]:
    labelled: dict[str, Any] = {}
    for key, value in summary.items():
        label = key.removeprefix("num_").replace("_", " ")
        if isinstance(value, Mapping):
            labelled |= {f"{label}: {name}": item for name, item in value.items()}
        else:
            labelled[label] = value
    return labelled


def cost_lines(inputs: ReportInputs) -> Lines:
    """Per arm: trained trajectories and tokens (one epoch), teacher calls and tokens, env steps.

    An arm with self-reflected data pays for the whole collection, dropped episodes included; the
    others pay nothing for it. What playing the golden trajectories cost is not counted.
    """
    arms = {BASE: {}, **inputs.config.get("arms", {})}
    lines: Lines = []
    for arm in dict.fromkeys([*arms, *inputs.datasets]):
        data = inputs.datasets.get(arm, {})
        if arm not in arms:
            paid: list[int | None] = [None, None, None]
        elif arms[arm].get("self_reflected", False):
            paid = _collection_cost(inputs.collection)
        else:
            paid = [0, 0, 0]
        lines.append((arm, [data.get("num_examples"), data.get("num_trained_tokens"), *paid]))
    return lines


def _collection_cost(collection: Sequence[Trajectory]) -> list[int | None]:
    """Teacher calls, teacher tokens (prompt and answer) and environment steps."""
    if not collection:
        return [None, None, None]
    usages = [trajectory.usage for trajectory in collection]
    return [
        sum(usage.teacher_calls for usage in usages),
        sum(usage.teacher_prompt_tokens + usage.teacher_completion_tokens for usage in usages),
        sum(usage.env_steps for usage in usages),
    ]


def collection_summary(
    collection: Sequence[Trajectory], confidence: float
) -> dict[str, list[tuple[str, Any]]] | None:
    """Facts and counts over the episodes of the collection; None when there are none."""
    if not collection:
        return None
    steps = [step for trajectory in collection for step in trajectory.steps]
    verdicts = [step.verdict for step in steps if step.verdict]
    faults = [v.error_type or "(none)" for v in verdicts if v.label is not VerdictLabel.GOOD]
    corrections = [_num_corrections(trajectory) for trajectory in collection]
    calls, tokens, env_steps = _collection_cost(collection)
    return {
        "facts": [
            ("episodes", count(len(collection))),
            ("successful", count(sum(trajectory.success for trajectory in collection))),
            ("success rate, %", " ".join(rate(success_interval(collection, confidence)))),
            ("environment steps", count(env_steps)),
            ("teacher calls", count(calls)),
            ("teacher tokens", count(tokens)),
            ("corrections", count(sum(corrections))),
            ("per episode", f"{sum(corrections) / len(collection):.2f}"),
        ],
        "counts": [
            ("Stop reasons", Counter(t.stop_reason.value for t in collection).most_common()),
            ("Verdicts on steps", Counter(v.label.value for v in verdicts).most_common()),
            ("Error types", Counter(faults).most_common()),
            ("Episodes by number of corrections", sorted(Counter(corrections).items())),
        ],
    }


def _num_corrections(trajectory: Trajectory) -> int:
    return sum(step.kind is StepKind.CORRECTION for step in trajectory.steps)


def pick_examples(collection: Sequence[Trajectory]) -> list[Trajectory]:
    """Trajectories with an error and a correction: solved and short first, types mixed."""
    wanted = {StepKind.ERROR, StepKind.CORRECTION}
    mended = [t for t in collection if wanted <= {step.kind for step in t.steps}]
    mended.sort(key=lambda t: (not t.success, len(t.steps), t.trajectory_id))
    first_of_type: dict[str, Trajectory] = {}
    for trajectory in mended:
        first_of_type.setdefault(trajectory.task.task_type, trajectory)
    order = {t.trajectory_id: t for t in [*first_of_type.values(), *mended]}
    return list(order.values())[:NUM_EXAMPLES_SHOWN]


def example_view(trajectory: Trajectory, mask_suboptimal: bool) -> dict[str, Any]:
    """A trajectory for the chat: each step, whether it is trained, and its reflection apart."""
    masked = {StepKind.ERROR, StepKind.UNJUDGED}
    masked |= {StepKind.SUBOPTIMAL} if mask_suboptimal else set()
    steps = [(step, step.kind not in masked, split_reflection(step)) for step in trajectory.steps]
    return {"trajectory": trajectory, "steps": steps}


def split_reflection(step: Step) -> tuple[str, str, str]:
    """The text before the reflection, the reflection, and the text after it."""
    if not step.reflection or step.reflection not in step.text:
        return step.text, "", ""
    return step.text.partition(step.reflection)
