"""`step-ray data stats`: what a collection holds, per task type, and what training keeps of it.

Takes trajectories and maybe a renderer, gives counts and tables. It changes nothing, and what it
calls kept is what masking.py keeps.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from rich.table import Table
from rich.text import Text

from step_ray.tools.show import visible
from step_ray.training.masking import NOTHING_TRAINED, TOO_LONG, is_trained, unwanted
from step_ray.training.recipe import DatasetConfig, Recipe
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


def set_stats(name: str, trajectories: Iterable[Trajectory], rules: KeepRules) -> SetStats:
    """Count the episodes of one folder, gone through once; per episode two numbers are kept."""
    fates, stops, faults = Counter[str](), Counter[str](), Counter[str]()
    whole, by_type = _TypeCounts(), defaultdict[str, _TypeCounts](_TypeCounts)
    for trajectory in trajectories:
        num_tokens = rules.num_tokens(trajectory) if rules.num_tokens else None
        fates[_fate(trajectory, num_tokens, rules)] += 1
        stops[trajectory.stop_reason.value] += 1
        faults.update(
            step.verdict.error_type or "(no label)"
            for step in trajectory.steps
            if step.verdict is not None and step.kind in (StepKind.ERROR, StepKind.SUBOPTIMAL)
        )
        for counts in (whole, by_type[trajectory.task.task_type or UNTYPED]):
            counts.add(trajectory, num_tokens)
    groups = sorted(by_type.items())
    if len(groups) > 1:
        groups.append(("all", whole))
    return SetStats(
        name=name,
        num_episodes=fates.total(),
        num_kept=fates.pop("", 0),
        dropped=dict(fates.most_common()),
        stop_reasons=dict(stops.most_common()),
        error_types=dict(faults.most_common()),
        types=[counts.stats(name) for name, counts in groups],
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


class _TypeCounts:
    """Adds up the episodes of one task type."""

    def __init__(self) -> None:
        self._num_solved = 0
        self._kinds: Counter[str] = Counter()
        self._steps, self._tokens = array("l"), array("l")

    def add(self, trajectory: Trajectory, num_tokens: int | None) -> None:
        self._num_solved += trajectory.success
        self._kinds.update(step.kind.value for step in trajectory.steps)
        self._steps.append(len(trajectory.steps))
        if num_tokens is not None:
            self._tokens.append(num_tokens)

    def stats(self, name: str) -> TypeStats:
        return TypeStats(
            task_type=name,
            num_episodes=len(self._steps),
            num_solved=self._num_solved,
            num_kinds={kind.value: self._kinds[kind.value] for kind in StepKind},
            steps=_lengths(self._steps),
            tokens=_lengths(self._tokens) if self._tokens else None,
        )


def _lengths(values: Sequence[int]) -> Lengths:
    return Lengths(mean=fmean(values), median=median(values), longest=max(values))


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
