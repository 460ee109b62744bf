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
from step_ray.stats import success_interval
from step_ray.types import Step, StepKind, Trajectory, VerdictLabel

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
    mask_suboptimal = _masks_suboptimal(inputs.config)
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            facts=run_facts(inputs.run),
            config_yaml=yaml.safe_dump(plain(inputs.config), sort_keys=False, allow_unicode=True),
            rows=rows,
            confidence=confidence,
            types=_by_task_type(rows, inputs.task_types),
            chart_log=charts.loss_chart(inputs.training, log_y=True),
            chart_linear=charts.loss_chart(inputs.training, log_y=False),
            validations=validation_lines(inputs.training),
            collection=collection_summary(inputs.collection, confidence),
            datasets=inputs.datasets,
            dataset_lines=dataset_lines(inputs.datasets),
            costs=cost_lines(inputs),
            examples=[example_view(t, mask_suboptimal) for t in pick_examples(inputs.collection)],
        )
    )
    write_text(Path(path), html)


def _environment() -> Environment:
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

    An arm with self-reflected data pays for the whole collection, dropped episodes included, an arm
    with its own successes for all rollouts; the others pay nothing. What playing the golden
    trajectories cost is not counted.
    """
    arms = {BASE: {}, **inputs.config.get("arms", {})}
    lines: Lines = []
    for arm in dict.fromkeys([*arms, *inputs.datasets]):
        data = inputs.datasets.get(arm, {})
        paid = _paid(inputs, arms[arm]) if arm in arms else [None, None, None]
        lines.append((arm, [data.get("num_examples"), data.get("num_trained_tokens"), *paid]))
    return lines


def _paid(inputs: ReportInputs, recipe: Mapping[str, Any]) -> list[int | None]:
    """Teacher calls, teacher tokens and environment steps behind the data of an arm."""
    kinds = {"self_reflected": inputs.collection, "own_success": inputs.own}
    costs = [_collection_cost(played) for kind, played in kinds.items() if recipe.get(kind, False)]
    if not costs:
        return [0, 0, 0]
    known = all(None not in cost for cost in costs)
    columns = zip(*costs, strict=True)
    return [sum(part or 0 for part in parts) if known else None for parts in columns]


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


def _masks_suboptimal(config: Mapping[str, Any]) -> bool:
    """What the first arm that masks errors does with suboptimal steps."""
    default: bool = config.get("dataset", {}).get("mask_suboptimal", True)
    for arm in config.get("arms", {}).values():
        if arm.get("self_reflected") and arm.get("mask_errors", True):
            own: bool | None = arm.get("mask_suboptimal")
            return default if own is None else own
    return default


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
