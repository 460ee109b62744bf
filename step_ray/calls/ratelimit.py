"""When a request may start, so that requests and tokens per minute stay under their limits.

Takes times and amounts, gives times; it neither waits nor reads a clock. Starts are evenly spaced
(virtual scheduling, the generic cell rate algorithm of ITU-T I.371 without a burst): two numbers of
state, and no minute, wherever it begins, holds more requests than the limit. Libraries such as
aiolimiter wait inside one event loop; this one serves many processes.
"""

import math


class RateLimiter:
    """The next free time of an endpoint. Times are seconds of any one clock."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._request_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._token_s = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._request_at = self._token_at = self._resume_at = -math.inf

    def next_start(self, now: float) -> float:
        """The earliest time at which a request may start, `now` at least."""
        return max(now, self._request_at, self._token_at, self._resume_at)

    def reserve(self, now: float, tokens: int) -> float:
        """Take the next start for a request of about so many tokens; gives its time."""
        start = self.next_start(now)
        self._request_at = start + self._request_s
        self._token_at = start + tokens * self._token_s
        return start

    def correct(self, tokens: int) -> None:
        """A request had so many tokens more than were reserved (fewer: negative)."""
        self._token_at += tokens * self._token_s

    def pause(self, until: float) -> None:
        """No request starts before this time (Retry-After)."""
        self._resume_at = max(self._resume_at, until)
