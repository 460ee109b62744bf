"""Trajectories -> training examples: filter, mask policy, comparison recipes, storage.

The loss mask is decided here, from the kind of each step and the recipe of the arm, so that one
collection serves every ablation. It renders no text itself (render.py) and trains nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import pyarrow as pa

from step_ray.errors import DataError, TemplateError
from step_ray.react import conversation, trajectory_messages
from step_ray.render import Renderer, Span
from step_ray.storage.records import VERSION_KEY
from step_ray.store import read_rows, write_table
from step_ray.training.masking import (
    LOW_REWARD,
    NOT_SUCCESSFUL,
    NOTHING_TRAINED,
    SAME_ROLLOUT,
    TOO_LONG,
    distinct,
    is_trained,
    steps_in_text,
    unwanted,
)
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.types import SCHEMA_VERSION, Message, Step, Trajectory

CUT_TO_MATCH = "cut to match"
REMEDIES = {
    NOT_SUCCESSFUL: "set dataset.keep: all",
    LOW_REWARD: "lower dataset.min_reward",
    TOO_LONG: "raise student.max_length",
    NOTHING_TRAINED: "mask fewer kinds of steps (policy no_mask trains all)",
}
"""Reason for which all was dropped -> what would keep it."""

EXAMPLE_SCHEMA = pa.schema(
    [
        ("trajectory_id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("error_mask", pa.list_(pa.bool_())),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
_FILE = "examples.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One trajectory as tokens."""

    trajectory_id: str
    source: str
    """Value of `types.Source`."""
    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    """True at the tokens that are trained, aligned with `input_ids` (the loss shifts, not we)."""
    error_mask: tuple[bool, ...] = ()
    """True at the agent's tokens that are kept out of the loss; not used for training."""

    @property
    def num_trained(self) -> int:
        """Trained tokens: this example's share of the loss denominator."""
        return sum(self.loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """What became of the trajectories: `num_trajectories + num_repeated = kept + dropped`."""

    num_trajectories: int
    num_examples: int
    by_source: Mapping[str, int]
    """Kept examples per `types.Source`."""
    dropped: Mapping[str, int]
    """Reason -> trajectories."""
    num_tokens: int
    num_trained_tokens: int
    num_masked_tokens: int
    """Tokens of the agent that are kept out of the loss."""
    num_repeated: int = 0
    """Examples that are there because the golden data was repeated (`match: trained_tokens`)."""
    match_target: int | None = None
    """What `recipe.match` asks for: trajectories of golden_collect, or trained tokens."""
    match_reached: int | None = None
    empty_sources: tuple[str, ...] = ()
    """Sources that the recipe names and of which no trajectory was kept."""

    @property
    def share_masked(self) -> float:
        """Share of the agent's tokens that is kept out of the loss."""
        agent = self.num_masked_tokens + self.num_trained_tokens
        return self.num_masked_tokens / agent if agent else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The trajectories that a recipe chooses from; each is gone through once, in this order."""

    golden: Iterable[Trajectory] = ()
    """Expert trajectories of U1."""
    golden_collect: Iterable[Trajectory] = ()
    """Expert trajectories of U2."""
    self_reflected: Iterable[Trajectory] = ()
    """Student and teacher on U2."""
    own_success: Sequence[Trajectory] = ()
    """The student alone on U2, several times per task; what failed is dropped, whatever `keep`."""


def build_examples(
    trajectories: Iterable[Trajectory], renderer: Renderer, recipe: Recipe, config: DatasetConfig
) -> tuple[list[Example], DatasetSummary]:
    """Filter, mask and render; every trajectory is an example or is counted as dropped.

    Raises:
        TemplateError: the student's chat template cannot be masked, see `Renderer`.
    """
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for trajectory in trajectories:
        outcome = unwanted(trajectory, config) or _example(trajectory, renderer, recipe, config)
        if isinstance(outcome, Example):
            examples.append(outcome)
        else:
            dropped[outcome] += 1
    return examples, summarize(examples, dropped)


def build_dataset(
    sources: Sources, renderer: Renderer, recipe: Recipe, config: DatasetConfig, *, seed: int
) -> tuple[list[Example], DatasetSummary]:
    """The examples of one arm: `build_examples` of each source, then `select_for_recipe`.

    The summary counts the sources that the arm trains on, not those it is only matched to.

    Raises:
        DataError: nothing is left to train on; the line names the sources and their counts.
        TemplateError: see `build_examples`.
    """
    built = {
        name: build_examples(getattr(sources, name), renderer, recipe, config)
        for name in ("golden", "golden_collect", "self_reflected")
    }
    built["own_success"] = _build_own(sources.own_success, renderer, recipe, config)
    parts = {name: examples for name, (examples, _) in built.items()}
    chosen = select_for_recipe(recipe, **parts, seed=seed)
    used = [summary for name, (_, summary) in built.items() if getattr(recipe, name)]
    if not chosen:
        counts = "; ".join(_count_line(n, s) for n, (_, s) in built.items() if getattr(recipe, n))
        raise DataError(f"dataset: no training examples ({counts}); {_remedy(used)}")
    dropped = sum((Counter(summary.dropped) for summary in used), Counter())
    num_built = sum(summary.num_examples for summary in used)
    dropped[CUT_TO_MATCH] = num_built - len(set(map(id, chosen)))
    empty = tuple(name for name in built if getattr(recipe, name) and not parts[name])
    summary = replace(summarize(chosen, +dropped), empty_sources=empty)
    return chosen, _with_match(summary, recipe, parts, chosen)


def build_validation(
    held_out: Iterable[Trajectory], renderer: Renderer, config: DatasetConfig
) -> tuple[list[Example], DatasetSummary]:
    """The validation set: the same filter, and errors masked whatever the arm trains.

    So all arms are measured on the same tokens, and the masked error tokens are there for those,
    too, that train on errors.

    Raises:
        DataError: nothing of it is left.
        TemplateError: see `build_examples`.
    """
    examples, summary = build_examples(held_out, renderer, Recipe(), config)
    if not examples:
        raise DataError(
            f"dataset: no validation example ({_count_line('held out', summary)});"
            " raise dataset.validation_tasks or set dataset.keep: all"
        )
    return examples, summary


def _build_own(
    own: Sequence[Trajectory], renderer: Renderer, recipe: Recipe, config: DatasetConfig
) -> tuple[list[Example], DatasetSummary]:
    """Rejection sampling: successes only (or by reward, as configured), equal ones once."""
    kept, num_same = distinct(own)
    only_success = config.model_copy(update={"keep": "success"})
    examples, summary = build_examples(kept, renderer, recipe, only_success)
    dropped = Counter(summary.dropped) + Counter({SAME_ROLLOUT: num_same})
    return examples, summarize(examples, dropped)


def select_for_recipe(
    recipe: Recipe,
    golden: Sequence[Example],
    golden_collect: Sequence[Example],
    self_reflected: Sequence[Example],
    own_success: Sequence[Example] = (),
    *,
    seed: int,
) -> list[Example]:
    """The examples of the arm, all built with the arm's own mask policy.

    `match: trajectories` keeps as many of `golden_collect` as there are self-reflected examples (or
    all, if there are fewer). `match: trained_tokens` repeats or cuts the golden data to the trained
    tokens of `golden + self_reflected`, to the nearest example. Which ones are kept depends only
    on `seed` and the trajectory ids.
    """
    collect = list(golden_collect) if recipe.golden_collect else []
    if recipe.match == "trajectories":
        collect = _shuffled(collect, seed)[: len(self_reflected)]
    pool = [*(golden if recipe.golden else ()), *collect]
    if recipe.match == "trained_tokens":
        pool = _fill(_shuffled(pool, seed), _num_trained([*golden, *self_reflected]))
    pool += self_reflected if recipe.self_reflected else ()
    return [*pool, *(own_success if recipe.own_success else ())]


def summarize(examples: Sequence[Example], dropped: Mapping[str, int]) -> DatasetSummary:
    """Counts of a list of examples; an example listed twice counts as repeated."""
    num_repeated = len(examples) - len(set(map(id, examples)))
    return DatasetSummary(
        num_trajectories=len(examples) - num_repeated + sum(dropped.values()),
        num_examples=len(examples),
        by_source=dict(sorted(Counter(example.source for example in examples).items())),
        dropped=dict(dropped),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_trained_tokens=_num_trained(examples),
        num_masked_tokens=sum(sum(example.error_mask) for example in examples),
        num_repeated=num_repeated,
    )


def step_spans(prompt: Sequence[Message], steps: Sequence[Step]) -> list[Span]:
    """Where each step stands in `react.conversation(prompt, steps)`.

    Read off the conversations of the step prefixes, so that react.py stays the one place that knows
    the layout. Where steps share a message, the newline between them belongs to the later one:
    going on instead of ending the turn is the first thing that a correction does.
    """
    spans: list[Span] = []
    done = 0
    for count, step in enumerate(steps, start=1):
        messages = conversation(prompt, steps[:count])
        index = len(messages) - (1 if step.observation is None else 2)
        shares = bool(spans) and spans[-1].message == index
        if shares:
            spans[-1] = replace(spans[-1], stop=done)
        spans.append(Span(message=index, start=done if shares else 0))
        done = len(messages[index].content)
    return spans


def write_examples(folder: str | Path, examples: Sequence[Example]) -> Path:
    """Write the training set as one Parquet file, whole or not at all; an old one is replaced.

    Raises:
        DataError: no examples, or a mask that is all False, all True or of another length.
    """
    if not examples:
        raise DataError(f"dataset: no examples to write to {str(folder)!r}; collect more tasks")
    for example in examples:
        _check(example)
    columns = [
        pa.array([getattr(example, name) for example in examples], EXAMPLE_SCHEMA.field(name).type)
        for name in EXAMPLE_SCHEMA.names
    ]
    path = Path(folder) / _FILE
    write_table(path, pa.Table.from_arrays(columns, schema=EXAMPLE_SCHEMA))
    return path


def read_examples(folder: str | Path) -> list[Example]:
    """The examples of `write_examples`, in their order.

    Raises:
        DataError: the file is missing, broken or newer than this version.
    """
    return [
        Example(
            trajectory_id=row["trajectory_id"],
            source=row["source"],
            input_ids=tuple(row["input_ids"]),
            loss_mask=tuple(row["loss_mask"]),
            error_mask=tuple(row["error_mask"]),
        )
        for row in read_rows(Path(folder) / _FILE)
    ]


def _example(
    trajectory: Trajectory, renderer: Renderer, recipe: Recipe, config: DatasetConfig
) -> Example | str:
    """The example of a trajectory, or why there is none."""
    steps = steps_in_text(trajectory, recipe, config)
    spans = step_spans(trajectory.prompt, steps)
    trained = [is_trained(step, recipe, config) for step in steps]
    try:
        rendered = renderer.render_example(
            trajectory_messages(replace(trajectory, steps=steps)),
            trained=_joined(span for span, yes in zip(spans, trained, strict=True) if yes),
            masked=_joined(span for span, yes in zip(spans, trained, strict=True) if not yes),
        )
    except (TemplateError, DataError) as exc:
        raise type(exc)(f"trajectory {trajectory.trajectory_id!r}: {exc}") from exc
    if rendered is None:
        return TOO_LONG
    if not any(rendered.loss_mask):
        return NOTHING_TRAINED
    return Example(
        trajectory_id=trajectory.trajectory_id,
        source=trajectory.source.value,
        input_ids=rendered.input_ids,
        loss_mask=rendered.loss_mask,
        error_mask=rendered.error_mask,
    )


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Spans with neighbours in one message joined, so that no token falls between them."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and last.message == span.message and last.stop == span.start:
            joined[-1] = replace(last, stop=span.stop)
        else:
            joined.append(span)
    return joined


def _with_match(
    summary: DatasetSummary,
    recipe: Recipe,
    parts: Mapping[str, Sequence[Example]],
    chosen: Sequence[Example],
) -> DatasetSummary:
    if recipe.match == "trajectories":
        target = len(parts["self_reflected"])
        reached = min(target, len(parts["golden_collect"]))
        return replace(summary, match_target=target, match_reached=reached)
    if recipe.match == "trained_tokens":
        target = _num_trained([*parts["golden"], *parts["self_reflected"]])
        return replace(summary, match_target=target, match_reached=_num_trained(chosen))
    return summary


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """An order that depends only on the seed and the ids: ids begin with the task type."""
    return sorted(
        examples,
        key=lambda example: hashlib.sha256(f"{seed}/{example.trajectory_id}".encode()).digest(),
    )


def _fill(pool: Sequence[Example], target: int) -> list[Example]:
    """Whole passes over the pool, then its first examples, to the nearest of `target` tokens."""
    total = _num_trained(pool)
    if not total:
        return []
    passes, rest = divmod(target, total)
    sums = list(accumulate((example.num_trained for example in pool), initial=0))
    extra = min(range(len(sums)), key=lambda count: abs(sums[count] - rest))
    return [*chain.from_iterable([pool] * passes), *pool[:extra]]


def _num_trained(examples: Iterable[Example]) -> int:
    return sum(example.num_trained for example in examples)


def _count_line(name: str, summary: DatasetSummary) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.dropped.items())
    return f"{name}: {summary.num_trajectories} trajectories" + (f", {reasons}" if reasons else "")


def _remedy(summaries: Iterable[DatasetSummary]) -> str:
    reasons = {reason for summary in summaries for reason in summary.dropped}
    known = [remedy for reason, remedy in REMEDIES.items() if reason in reasons]
    return " or ".join(["collect more tasks", *known])


def _check(example: Example) -> None:
    lengths = {len(example.loss_mask), len(example.error_mask or example.loss_mask)}
    if lengths != {len(example.input_ids)}:
        raise DataError(f"example {example.trajectory_id!r}: masks and input_ids differ in length")
    if all(example.loss_mask) or not any(example.loss_mask):
        which = "all" if any(example.loss_mask) else "none"
        raise DataError(
            f"example {example.trajectory_id!r}: {which} of its tokens are trained; an example has"
            " a prompt and an answer, build it again"
        )
