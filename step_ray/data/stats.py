"""`step-ray data stats`: what a collection holds, per task type, and what training keeps of it.

Takes trajectories and maybe a renderer, gives counts and tables. It changes nothing, and what it
calls kept is what masking.py keeps.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from rich.table import Table
from rich.text import Text

from step_ray.masking import NOTHING_TRAINED, TOO_LONG, is_trained, unwanted
from step_ray.recipe import DatasetConfig, Recipe
from step_ray.show import visible
from step_ray.types import StepKind, Trajectory

UNTYPED = "(no type)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Distribution of a length over episodes."""

    mean: float
    median: float
    longest: int

    def __str__(self) -> str:
        return f"{self.median:g}/{self.longest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeStats:
    """Counts of the episodes of one task type."""

    task_type: str
    num_episodes: int
    num_solved: int
    num_kinds: Mapping[str, int]
    """Value of `types.StepKind` -> steps."""
    steps: Lengths
    """Assistant turns per episode."""
    tokens: Lengths | None
    """Tokens per episode as rendered for training; None: no tokenizer was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStats:
    """Counts of one folder: `num_episodes = num_kept + dropped`."""

    name: str
    num_episodes: int
    num_kept: int
    dropped: Mapping[str, int]
    """Reason -> episodes; without a tokenizer nothing is too long."""
    stop_reasons: Mapping[str, int]
    error_types: Mapping[str, int]
    """The teacher's label -> steps that it found faulty."""
    types: Sequence[TypeStats]
    """By name; the last one is all of them if there are several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    """What the kept episodes are counted by."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    max_tokens: int | None = None
    """Longest example; None: no limit."""
    num_tokens: Callable[[Trajectory], int] | None = None
    """Tokens of a rendered episode; None: lengths in tokens are not known."""


def set_stats(name: str, trajectories: Sequence[Trajectory], rules: KeepRules) -> SetStats:
    """Count the episodes of one folder."""
    tokens = [rules.num_tokens(t) if rules.num_tokens else None for t in trajectories]
    fates = Counter(_fate(t, n, rules) for t, n in zip(trajectories, tokens, strict=True))
    by_type: dict[str, list[int]] = {}
    for number, trajectory in enumerate(trajectories):
        by_type.setdefault(trajectory.task.task_type or UNTYPED, []).append(number)
    groups = sorted(by_type.items())
    if len(groups) > 1:
        groups.append(("all", list(range(len(trajectories)))))
    return SetStats(
        name=name,
        num_episodes=len(trajectories),
        num_kept=fates.pop("", 0),
        dropped=dict(fates.most_common()),
        stop_reasons=_counted(t.stop_reason.value for t in trajectories),
        error_types=_counted(
            step.verdict.error_type or "(no label)"
            for t in trajectories
            for step in t.steps
            if step.verdict is not None and step.kind in (StepKind.ERROR, StepKind.SUBOPTIMAL)
        ),
        types=[
            _type_stats(name, [trajectories[n] for n in numbers], [tokens[n] for n in numbers])
            for name, numbers in groups
        ],
    )


def _fate(trajectory: Trajectory, num_tokens: int | None, rules: KeepRules) -> str:
    """Why training drops an episode; empty: it stays. The order is that of dataset.py."""
    reason = unwanted(trajectory, rules.dataset)
    if reason:
        return reason
    if None not in (num_tokens, rules.max_tokens) and num_tokens > rules.max_tokens:  # type: ignore
        return TOO_LONG
    recipe = Recipe()
    trained = any(is_trained(step, recipe, rules.dataset) for step in trajectory.steps)
    return "" if trained else NOTHING_TRAINED


def _type_stats(
    name: str, trajectories: Sequence[Trajectory], tokens: Sequence[int | None]
) -> TypeStats:
    kinds = Counter(step.kind.value for t in trajectories for step in t.steps)
    known = [number for number in tokens if number is not None]
    return TypeStats(
        task_type=name,
        num_episodes=len(trajectories),
        num_solved=sum(t.success for t in trajectories),
        num_kinds={kind.value: kinds[kind.value] for kind in StepKind},
        steps=_lengths([len(t.steps) for t in trajectories]),
        tokens=_lengths(known) if known else None,
    )


def _lengths(values: Sequence[int]) -> Lengths:
    return Lengths(mean=fmean(values), median=median(values), longest=max(values))


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def type_table(stats: SetStats) -> Table:
    """One row per task type, 80 characters wide; lengths are median/longest."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("steps, tokens: median/longest", overflow="fold")
    kinds = {
        StepKind.ERROR: "errors",
        StepKind.SUBOPTIMAL: "subopt",
        StepKind.CORRECTION: "correct",
    }
    for name in ("n", "solved", *kinds.values(), "steps", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in stats.types:
        table.add_row(
            Text(visible(row.task_type)),
            str(row.num_episodes),
            str(row.num_solved),
            *(str(row.num_kinds[kind.value]) for kind in kinds),
            str(row.steps),
            str(row.tokens) if row.tokens else "-",
        )
    return table


def count_lines(stats: SetStats) -> list[str]:
    """What the table does not show, a line each."""
    lines = [
        f"{stats.name}: {stats.num_episodes} episodes,"
        f" {stats.num_kept} kept, {stats.num_episodes - stats.num_kept} dropped"
        + (f" ({listed(stats.dropped)})" if stats.dropped else ""),
        f"ended by: {listed(stats.stop_reasons)}",
    ]
    if stats.error_types:
        lines.append(f"faults: {listed(stats.error_types)}")
    unjudged = sum(row.num_kinds[StepKind.UNJUDGED.value] for row in stats.types[-1:])
    return [*lines, f"unjudged last steps: {unjudged}"] if unjudged else lines


def listed(counts: Mapping[str, int]) -> str:
    """`3 this, 1 that`, printable."""
    return visible(", ".join(f"{count} {name}" for name, count in counts.items()))
