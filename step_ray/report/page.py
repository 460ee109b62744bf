"""The HTML page: gathers what each section shows and renders the template.

Takes `ReportInputs`, writes one file that needs nothing else. All text is escaped, and the page
itself forbids scripts and requests, because observations and answers of models are untrusted.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from step_ray.evaluation.stats import PairedDifference, wilson_interval
from step_ray.report import charts
from step_ray.report.collection import CollectionCounts
from step_ray.report.cost import collection_cost
from step_ray.report.results import (
    BASE,
    GOLDEN_ONLY,
    NOT_RUN,
    ReportInputs,
    ResultRow,
    costs,
    count,
    difference,
    plain,
    rate,
    results_rows,
    write_text,
)
from step_ray.types import Interval, Step, StepKind, Trajectory

RUN_FACTS = ("name", "created", "config_digest", "git_revision", "versions", "machine")
"""Keys of `ReportInputs.run` that the header always shows, recorded or not; others follow."""
DEFAULT_CONFIDENCE = 0.95

Lines: TypeAlias = list[tuple[str, list[Any]]]
"""A table: label and cells of each line."""


def write_report(path: str | Path, inputs: ReportInputs) -> None:
    """Write the report as one HTML file, whole or not at all.

    Raises:
        DataError: two evaluations of one arm.
    """
    body = report_body(inputs, "episodes.html")
    page = environment().get_template("report.html.j2")
    write_text(Path(path), page.render(name=run_facts(inputs.run)[0][1], body=body))


def report_body(inputs: ReportInputs, viewer: str) -> Markup:
    """The report without a page around it.

    Args:
        inputs: what it shows.
        viewer: the file with the episodes; empty: they are in the same page.

    Raises:
        DataError: two evaluations of one arm.
    """
    rows = results_rows(inputs)
    confidences = [row.report.success_rate.confidence for row in rows if row.report]
    confidence = confidences[0] if confidences else DEFAULT_CONFIDENCE
    mask_suboptimal = _masks_suboptimal(inputs.config)
    return Markup(
        environment()
        .get_template("report_body.html.j2")
        .render(
            viewer=viewer,
            facts=run_facts(inputs.run),
            config_yaml=yaml.safe_dump(plain(inputs.config), sort_keys=False, allow_unicode=True),
            rows=rows,
            confidence=confidence,
            is_graded=_is_graded(rows),
            types=_by_task_type(rows, inputs.task_types, "by_task_type"),
            type_scores=_by_task_type(rows, inputs.task_types, "reward_by_task_type"),
            behaviour=_behaviour(rows),
            forest=charts.forest(differences(rows)),
            chart_log=charts.loss_chart(inputs.training, log_y=True),
            chart_linear=charts.loss_chart(inputs.training, log_y=False),
            validations=validation_lines(inputs.training),
            collection=collection_summary(inputs.collection, confidence),
            spending=spending_facts(inputs.collection_state),
            datasets=inputs.datasets,
            dataset_lines=dataset_lines(inputs.datasets),
            costs=cost_lines(inputs),
            episodes=inputs.episodes,
            examples=[example_view(t, mask_suboptimal) for t in inputs.collection.examples()],
        )
    )


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


def _is_graded(rows: Sequence[ResultRow]) -> bool:
    """Whether scores say more than successes do."""
    run = [row.report for row in rows if row.report]
    return any(abs(r.mean_reward.estimate - r.success_rate.estimate) > 1e-9 for r in run)


def _by_task_type(
    rows: Sequence[ResultRow], task_types: Mapping[str, str], which: str
) -> dict[str, Any]:
    """Arms that were run, and per task type its number of tasks and each arm's interval.

    `which` is a field of `EvalReport`.
    """
    run = [row.report for row in rows if row.report]
    found: list[Mapping[str, Interval]] = [getattr(report, which) for report in run]
    numbers = Counter(task_types.values())
    names = sorted({name for intervals in found for name in intervals})
    return {
        "arms": [report.model for report in run],
        "lines": [
            (name or "(none)", numbers.get(name), [intervals.get(name) for intervals in found])
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
    """Per arm, see cost.ArmCost: data of one epoch, teacher calls and tokens, money, env steps."""
    arms = dict.fromkeys([BASE, *inputs.config.get("arms", {}), *inputs.datasets])
    return [(arm, list(asdict(costs(inputs, arm)).values())) for arm in arms]


def validation_lines(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> Lines:
    """Per arm: its last validation loss and error-step NLL, its best validation loss and the step.

    Arms without a validation are left out.
    """
    lines: Lines = []
    for arm, metrics in training.items():
        validated = [line for line in metrics if line.get("validation_loss") is not None]
        if validated:
            last, best = validated[-1], min(validated, key=lambda line: line["validation_loss"])
            loss = "validation_loss"
            lines.append((arm, [last[loss], last.get("error_nll"), best[loss], best["step"]]))
    return lines


def collection_summary(
    collection: CollectionCounts, confidence: float
) -> dict[str, list[tuple[str, Any]]] | None:
    """Facts and counts over the episodes of the collection; None when there are none."""
    if not collection.num_episodes:
        return None
    rates = collection.success_by_task()
    success = wilson_interval(math.fsum(rates), len(rates), confidence)
    corrections, cost = collection.num_corrections, collection_cost(collection)
    return {
        "facts": [
            ("episodes", count(collection.num_episodes)),
            ("successful", count(collection.num_success)),
            ("success rate, %", " ".join(rate(success))),
            ("environment steps", count(cost.env_steps)),
            ("teacher calls", count(cost.teacher_calls)),
            ("teacher tokens", count(cost.teacher_tokens)),
            ("replies from the cache", count(cost.teacher_cached_calls)),
            ("money", count(cost.money)),
            ("corrections", count(corrections)),
            ("per episode", f"{corrections / collection.num_episodes:.2f}"),
        ],
        "counts": [
            ("Stop reasons", collection.stops.most_common()),
            ("Verdicts on steps", collection.verdicts.most_common()),
            ("Error types", collection.faults.most_common()),
            ("Episodes by number of corrections", sorted(collection.corrections.items())),
        ],
    }


def spending_facts(state: Mapping[str, Any]) -> list[str]:
    """Sentences on what the collection has spent in all, and on what it left undone."""
    summary = state.get("summary", {})
    if "spent_calls" not in summary:
        return []
    spent = ", ".join(
        f"{count(summary[f'spent_{name}'])} {name}" for name in ("calls", "tokens", "money")
    )
    limits = ", ".join(f"{count(limit)} {name}" for name, limit in state.get("budget", {}).items())
    lines = [
        "Spent on teacher and student (calls and tokens: of the teacher) in all, episodes that were"
        f" lost or played again included: {spent}"
        + (f"; budget: {limits}." if limits else "; no budget.")
    ]
    if summary.get("unfinished"):
        lines.append(f"Not all of it was played: {summary['unfinished']}.")
    return lines


def _masks_suboptimal(config: Mapping[str, Any]) -> bool:
    """What the first arm that masks errors does with suboptimal steps."""
    default: bool = config.get("dataset", {}).get("mask_suboptimal", True)
    for arm in config.get("arms", {}).values():
        if arm.get("self_reflected") and arm.get("mask_errors", True):
            own: bool | None = arm.get("mask_suboptimal")
            return default if own is None else own
    return default


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
