"""Counts over the episodes of a stage, added up one by one.

Takes outcomes as they are read, gives an `EpisodesSummary`. It keeps no episode.
"""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from step_ray.calls.spending import Spending, budgeted_spending
from step_ray.store import Outcome
from step_ray.types import ERROR_STOPS, StopReason, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodesSummary:
    """What a stage of episodes has on disk at its end."""

    num_episodes: int
    num_resumed: int
    """Episodes that were already there."""
    num_success: int
    num_errors: int
    stop_reasons: dict[str, int]
    num_steps: int
    teacher_calls: int
    teacher_tokens: int
    retries: int
    seconds: float
    num_not_started: int = 0
    """Episodes that were asked for and that the teacher's budget let not begin."""
    num_restarts: int = 0
    """Episodes of this start that were begun again, because their actor or its node was lost."""
    teacher_cached_calls: int = 0
    """Replies that were read from the cache; not among `teacher_calls`."""
    teacher_unstructured_calls: int = 0
    """Of `teacher_calls`: without a schema, because the endpoint refuses one."""
    cache_faults: int = 0
    """Entries of the cache that could not be read or written."""
    teacher_cost: float = 0.0
    student_cost: float = 0.0
    """Money, by the price table, of the episodes that count."""
    spent_calls: int = 0
    spent_tokens: int = 0
    spent_money: float = 0.0
    """Of the budget so far, for episodes that were lost or played again too."""

    def unfinished(self) -> str:
        """What the budget kept from being played, and how to go on; empty when nothing was."""
        num_ended = self.stop_reasons.get(StopReason.BUDGET.value, 0)
        if not (self.num_not_started or num_ended):
            return ""
        return (
            f"the teacher's budget is spent: {self.num_not_started:,} episodes did not begin,"
            f" {num_ended:,} were ended on the way, {self.num_episodes - num_ended:,} are whole;"
            " raise teacher.budget and the same command goes on"
        )

    def notices(self) -> list[str]:
        """What somebody who waits for a collection must not overlook."""
        lines = {
            "episodes ended by an error and were not played again; --retry-errors plays"
            " them": self.num_errors,
            "episodes were begun again, because an actor or a node was lost": self.num_restarts,
            "teacher calls went without a schema: the endpoint has no response_format"
            " json_schema": self.teacher_unstructured_calls,
            "entries of the teacher's cache could not be read or written": self.cache_faults,
            "teacher replies came from the cache": self.teacher_cached_calls,
        }
        return [f"{count:,} {line}" for line, count in lines.items() if count]


class Totals:
    """Adds up episodes, each of which is given once."""

    def __init__(self) -> None:
        self._num_episodes = self._num_success = self._num_steps = 0
        self._stops: Counter[str] = Counter()
        self._usage: dict[str, Any] = {field.name: field.default for field in fields(Usage)}

    def add(self, outcome: Outcome) -> None:
        """Count one episode."""
        self._num_episodes += 1
        self._num_success += outcome.success
        self._num_steps += outcome.num_steps
        self._stops[outcome.stop_reason.value] += 1
        for name in self._usage:
            self._usage[name] += getattr(outcome.usage, name)

    def summary(
        self,
        *,
        num_resumed: int,
        seconds: float,
        num_wanted: int,
        spent: Spending,
        num_restarts: int,
    ) -> EpisodesSummary:
        """What was counted.

        Args:
            num_resumed: how many were there before.
            seconds: wall time.
            num_wanted: episodes that were asked for.
            spent: of the budget, in all.
            num_restarts: episodes that were begun more than once.
        """
        usage = Usage(**self._usage)
        paid = budgeted_spending([usage])
        return EpisodesSummary(
            num_episodes=self._num_episodes,
            num_resumed=num_resumed,
            num_success=self._num_success,
            num_errors=sum(self._stops[stop.value] for stop in ERROR_STOPS),
            stop_reasons=dict(sorted(self._stops.items())),
            num_steps=self._num_steps,
            teacher_calls=paid.calls,
            teacher_tokens=paid.tokens,
            retries=usage.retries,
            seconds=seconds,
            num_restarts=num_restarts,
            num_not_started=max(0, num_wanted - self._num_episodes),
            teacher_cached_calls=usage.teacher_cached_calls,
            teacher_unstructured_calls=usage.teacher_unstructured_calls,
            cache_faults=usage.cache_faults,
            teacher_cost=usage.teacher_cost,
            student_cost=usage.student_cost,
            spent_calls=spent.calls,
            spent_tokens=spent.tokens,
            spent_money=spent.money,
        )
