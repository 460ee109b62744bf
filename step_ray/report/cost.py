"""What arms and their collection cost: data, calls, tokens, money.

Takes counts over episodes and dataset summaries, gives numbers. It shows nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
    recipe: Mapping[str, Any] | None, dataset: Mapping[str, Any], collected: ArmCost
) -> ArmCost:
    """What an arm cost.

    An arm with self-reflected data pays for the whole collection, dropped episodes included; the
    others pay nothing for it. What playing the golden trajectories cost is not counted.

    Args:
        recipe: its settings; None: unknown.
        dataset: fields of its dataset.DatasetSummary, or nothing.
        collected: cost of the collection.
    """
    if recipe is None:
        paid = ArmCost()
    else:
        paid = collected if recipe.get("self_reflected", False) else NOTHING
    return ArmCost(
        trained_trajectories=dataset.get("num_examples"),
        trained_tokens=dataset.get("num_trained_tokens"),
        teacher_calls=paid.teacher_calls,
        teacher_tokens=paid.teacher_tokens,
        teacher_cached_calls=paid.teacher_cached_calls,
        money=paid.money,
        env_steps=paid.env_steps,
    )
