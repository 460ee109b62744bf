"""When a stage of episodes has failed: too many ended by a fault of the machinery.

Takes stop reasons as they come, gives one line when the stage is to stop. It stops nothing itself.
"""

from collections import Counter

from step_ray.evaluation.stats import wilson_interval
from step_ray.store import Outcome
from step_ray.types import ERROR_STOPS, StopReason

CONFIDENCE = 0.999
"""Of the interval that says that the share of errors is too large: it is looked at after every
episode, so chance has many tries."""


class ErrorWatch:
    """Counts the errors of a stage, and judges whether it can still end well.

    Args:
        num_wanted: episodes that were asked for in all.
        max_share: of them, the share that may end by an error.
        max_errors: the same as a number; None: no such limit.
        judged_after: episodes of this start before their share is judged.
    """

    def __init__(
        self, *, num_wanted: int, max_share: float, max_errors: int | None, judged_after: int
    ) -> None:
        self._num_wanted, self._max_share = num_wanted, max_share
        self._max_errors, self._judged_after = max_errors, judged_after
        self._num_played = self._num_failed = 0
        self._stops: Counter[StopReason] = Counter()
        self._first: str = ""

    def add(self, outcome: Outcome, *, is_old: bool = False) -> None:
        """Count an episode; an old one was on disk before this start, and is not judged again."""
        stop = outcome.stop_reason
        self._num_played += not is_old
        if stop not in ERROR_STOPS:
            return
        self._stops[stop] += 1
        self._num_failed += not is_old
        self._first = self._first or f"{outcome.trajectory_id}: {outcome.error}"

    @property
    def fault(self) -> str:
        """Why the stage cannot be used once all is played; empty when it can."""
        num_errors, of = self._stops.total(), f"{self._num_wanted}"
        if self._max_errors is not None and num_errors > self._max_errors:
            return self._line(of, f"collect.max_errors {self._max_errors}")
        if num_errors > self._max_share * self._num_wanted:
            return self._line(of, f"collect.max_error_share {self._max_share:g}")
        return ""

    @property
    def forecast(self) -> str:
        """Why the stage is to stop now; empty while it may end well."""
        is_counted = self._max_errors is not None and self._stops.total() > self._max_errors
        if is_counted or (self.fault and self._num_played >= self._judged_after):
            return self.fault
        if self._num_played < self._judged_after or not self._num_failed:
            return ""
        interval = wilson_interval(self._num_failed, self._num_played, CONFIDENCE)
        if interval.low <= self._max_share:
            return ""
        of = f"the first {self._num_played}"
        return self._line(of, f"collect.max_error_share {self._max_share:g}")

    def _line(self, of: str, limit: str) -> str:
        counts = ", ".join(f"{stop} {count}" for stop, count in sorted(self._stops.items()))
        return (
            f"{self._stops.total()} of {of} episodes ended by an error ({counts}), more than"
            f" {limit} allows; with --retry-errors (collect.retry_errors) the same command plays"
            f" these again (first: {self._first})"
        )
