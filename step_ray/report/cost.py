"""What arms and their collection cost: data, calls, tokens, money.

Takes counts over episodes and dataset summaries, gives numbers. It shows nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from step_ray.report.collection import CollectionCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCost:
    """What one arm was made from; None: not measured."""

    trained_trajectories: int | None = None
    """Of one epoch, repeated ones included."""
    trained_tokens: int | None = None
    teacher_calls: int | None = None
    teacher_tokens: int | None = None
    """Prompt and answer."""
    teacher_cached_calls: int | None = None
    """Replies from the cache: not among `teacher_calls`, and free."""
    money: float | None = None
    """Of student and teacher, by the price table."""
    env_steps: int | None = None


NOTHING = ArmCost(teacher_calls=0, teacher_tokens=0, teacher_cached_calls=0, money=0.0, env_steps=0)


def collection_cost(collection: CollectionCounts) -> ArmCost:
    """What the episodes cost that are there, kept or not."""
    if not collection.num_episodes:
        return ArmCost()
    return ArmCost(
        teacher_calls=collection.teacher_calls,
        teacher_tokens=collection.teacher_tokens,
        teacher_cached_calls=collection.teacher_cached_calls,
        money=collection.money,
        env_steps=collection.env_steps,
    )


def arm_cost(
    recipe: Mapping[str, Any] | None,
    dataset: Mapping[str, Any],
    collected: ArmCost,
    own: ArmCost,
) -> ArmCost:
    """What an arm cost.

    An arm with self-reflected data pays for the whole collection, dropped episodes included, an arm
    with its own successes for all rollouts; the others pay nothing. What playing the golden
    trajectories cost is not counted.

    Args:
        recipe: its settings; None: unknown.
        dataset: fields of its dataset.DatasetSummary, or nothing.
        collected: cost of the collection.
        own: cost of the rollouts of the base agent alone.
    """
    return replace(
        ArmCost() if recipe is None else _paid(recipe, collected, own),
        trained_trajectories=dataset.get("num_examples"),
        trained_tokens=dataset.get("num_trained_tokens"),
    )


def _paid(recipe: Mapping[str, Any], collected: ArmCost, own: ArmCost) -> ArmCost:
    sources = {"self_reflected": collected, "own_success": own}
    costs = [cost for name, cost in sources.items() if recipe.get(name, False)]
    if ArmCost() in costs:  # not all of it was measured
        return ArmCost()
    return reduce(_plus, costs, NOTHING)


def _plus(a: ArmCost, b: ArmCost) -> ArmCost:
    names = ("teacher_calls", "teacher_tokens", "teacher_cached_calls", "money", "env_steps")
    return ArmCost(**{name: getattr(a, name) + getattr(b, name) for name in names})
