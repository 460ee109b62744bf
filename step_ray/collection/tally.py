"""The running count of a stage of episodes: won, failed, corrections, speed, money, time left.

Takes outcomes of episodes, gives one line. It prints nothing and reads the clock that it is given.
"""

import time
from collections import Counter
from collections.abc import Callable

from step_ray.store import Outcome
from step_ray.types import ERROR_STOPS


def num_generated(outcome: Outcome) -> int:
    """Tokens that student and teacher wrote, cached replies not counted."""
    return outcome.usage.completion_tokens + outcome.usage.teacher_completion_tokens


class Tally:
    """Adds up the episodes of a stage.

    Args:
        total: episodes that were asked for.
        money: limit of the budget, to show beside what is paid; None: no limit.
        clock: seconds of any one clock.
    """

    def __init__(
        self,
        total: int,
        money: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._money, self._clock = total, money, clock
        self.num_done = self._num_won = self._num_corrections = 0
        self._num_old = self._tokens = 0
        self._is_taught = False
        self._failed: Counter[str] = Counter()
        self._cost = 0.0
        self._started: float | None = None

    def add(self, outcome: Outcome) -> None:
        """Count an episode: one that was there, before `begin`; one that ended now, after it."""
        self.num_done += 1
        self._num_won += outcome.success
        self._num_corrections += outcome.num_corrections
        self._is_taught |= outcome.is_taught
        if outcome.stop_reason in ERROR_STOPS:
            self._failed[outcome.stop_reason.value] += 1
        self._cost += outcome.usage.teacher_cost + outcome.usage.student_cost
        if self._started is not None:
            self._tokens += num_generated(outcome)

    def begin(self) -> None:
        """Episodes are played from now on: speed and time left are theirs."""
        self._started, self._num_old = self._clock(), self.num_done

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated in the episodes that ended since the beginning, per second of it."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Until all are done, at the pace so far; None: nothing has ended yet."""
        num_new = self.num_done - self._num_old
        if not num_new or not self._seconds:
            return None
        return self._seconds / num_new * (self._total - self.num_done)

    @property
    def _seconds(self) -> float:
        return 0.0 if self._started is None else self._clock() - self._started

    def line(self) -> str:
        """All of it, shortly."""
        parts = [f"{self._num_won:,} won"]
        reasons = ", ".join(f"{stop} {count}" for stop, count in sorted(self._failed.items()))
        parts.append(f"{self._failed.total():,} failed" + (f" ({reasons})" if reasons else ""))
        if self._is_taught:
            parts.append(f"{self._num_corrections / self.num_done:.1f} corrections each")
        if self._tokens:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self._cost:
            limit = "" if self._money is None else f" of {self._money:,g}"
            parts.append(f"cost {self._cost:,.2f}{limit}")
        if self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time to wait, in the two largest units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
