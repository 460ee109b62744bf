"""Counts over the episodes of a stage, added up one by one.

Takes outcomes as they are read, gives an `EpisodesSummary` and a refusal when too many ended by a
fault of the machinery. It keeps no episode.
"""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from step_ray.errors import EpisodesError
from step_ray.spending import Spending, teacher_spending
from step_ray.store import Outcome
from step_ray.types import ERROR_STOPS, Usage


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
    """Paid to the teacher so far, for episodes that were lost or played again too."""

    def notices(self) -> list[str]:
        """What somebody who waits for a collection must not overlook."""
        lines = {
            "episodes did not begin, because the teacher's budget is spent; raise teacher.budget"
            " and the same command goes on": self.num_not_started,
            "teacher calls went without a schema: the endpoint has no response_format"
            " json_schema": self.teacher_unstructured_calls,
            "entries of the teacher's cache could not be read or written": self.cache_faults,
            "teacher replies came from the cache": self.teacher_cached_calls,
        }
        return [f"{count:,} {line}" for line, count in lines.items() if count]


class Tally:
    """Adds up episodes, each of which is given once."""

    def __init__(self) -> None:
        self.num_episodes = self.num_success = self._num_steps = 0
        self._stops: Counter[str] = Counter()
        self._usage: dict[str, Any] = {field.name: field.default for field in fields(Usage)}
        self._first_fault: Outcome | None = None

    def add(self, outcome: Outcome) -> None:
        """Count one episode."""
        self.num_episodes += 1
        self.num_success += outcome.success
        self._num_steps += outcome.num_steps
        self._stops[outcome.stop_reason.value] += 1
        for name in self._usage:
            self._usage[name] += getattr(outcome.usage, name)
        if outcome.stop_reason in ERROR_STOPS:
            self._first_fault = self._first_fault or outcome

    @property
    def faults(self) -> dict[str, int]:
        """Error stop -> episodes that ended by it."""
        return {stop.value: n for stop in sorted(ERROR_STOPS) if (n := self._stops[stop.value])}

    def refuse_errors(self, max_share: float) -> None:
        """A list with holes is no result: numbers made from it would be about the machinery.

        Raises:
            EpisodesError: more than `max_share` of the episodes ended by an error.
        """
        faults, first = self.faults, self._first_fault
        num = sum(faults.values())
        if first is None or num <= max_share * self.num_episodes:
            return
        raise EpisodesError(
            f"{num} of {self.num_episodes} episodes ended by an error"
            f" ({', '.join(f'{stop} {count}' for stop, count in faults.items())}), more than"
            f" collect.max_error_share {max_share:g} allows; the same command plays these again"
            f" (first: {first.trajectory_id}: {first.error})"
        )

    def summary(
        self, *, num_resumed: int, seconds: float, num_wanted: int, spent: Spending
    ) -> EpisodesSummary:
        """What was counted.

        Args:
            num_resumed: how many were there before.
            seconds: wall time.
            num_wanted: episodes that were asked for.
            spent: what the teacher was paid in all.
        """
        usage = Usage(**self._usage)
        paid = teacher_spending([usage])
        return EpisodesSummary(
            num_episodes=self.num_episodes,
            num_resumed=num_resumed,
            num_success=self.num_success,
            num_errors=sum(self.faults.values()),
            stop_reasons=dict(sorted(self._stops.items())),
            num_steps=self._num_steps,
            teacher_calls=paid.calls,
            teacher_tokens=paid.tokens,
            retries=usage.retries,
            seconds=seconds,
            num_not_started=max(0, num_wanted - self.num_episodes),
            teacher_cached_calls=usage.teacher_cached_calls,
            teacher_unstructured_calls=usage.teacher_unstructured_calls,
            cache_faults=usage.cache_faults,
            teacher_cost=paid.money,
            student_cost=usage.student_cost,
            spent_calls=spent.calls,
            spent_tokens=spent.tokens,
            spent_money=spent.money,
        )
