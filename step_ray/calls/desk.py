"""The desk of a job: one place that lets episodes begin, grants requests to the teacher and counts
what they cost.

Takes the names of episodes and the messages of all gates (gate.py), gives waits and refusals; keeps
a ledger on disk, so that a budget holds over kills. It makes no call and never waits; as a Ray
actor it is one per job (collect.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path

from step_ray.calls.gate import Answer, Ask, Settled
from step_ray.calls.ratelimit import RateLimiter
from step_ray.calls.spending import NOTHING, Spending
from step_ray.collection.teacher_config import BudgetConfig, TeacherConfig
from step_ray.errors import DataError
from step_ray.storage.places import mirror
from step_ray.storage.remote import pull
from step_ray.store import read_json, write_json

HORIZON_S = 2.0
"""Turns are given out this far ahead, so that little is lost with a caller that gives up."""
LEDGER_EVERY_S = 1.0
"""How much counted work a killed job forgets at most."""


class Start(StrEnum):
    """Whether an episode may begin."""

    GO = "go"
    BUDGET = "budget"
    """The teacher's budget is spent."""
    FATAL = "fatal"
    """Too many actors have died while they played it."""


class TeacherDesk:
    """Starts, rate limits and budget of one collection."""

    def __init__(
        self,
        config: TeacherConfig,
        spent: Spending,
        ledger: str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_starts: int = 5,
    ) -> None:
        self._max_starts = max_starts
        self._under_way: dict[str, int] = {}
        self._num_starts = 0
        self._budget: BudgetConfig = config.budget
        self._limiter = RateLimiter(config.requests_per_minute, config.tokens_per_minute)
        self._ledger, self._clock = mirror(ledger) if ledger else None, clock
        # a desk that was restarted, here or elsewhere, finds what it had counted
        self._spent = spent.or_more(read_ledger(self._ledger)) if self._ledger else spent
        self._reserved = Spending()
        self._written = self._spent
        self._written_at = clock()

    def start(self, name: str) -> Start:
        """An actor wants to begin an episode; again, when the actor before it died."""
        if self._budget.refusal(self._spent + self._reserved) is not None:
            return Start.BUDGET
        starts = self._under_way.get(name, 0)
        if starts >= self._max_starts:
            return Start.FATAL
        # only what is under way is remembered: a job may have a million episodes
        self._under_way[name] = starts + 1
        self._num_starts += 1
        return Start.GO

    def end(self, name: str) -> None:
        """An episode is over."""
        self._under_way.pop(name, None)

    def num_starts(self) -> int:
        """Episodes that were begun, those begun again each time."""
        return self._num_starts

    def serve(self, asks: Sequence[Ask], settled: Sequence[Settled], pause_s: float) -> Answer:
        """Count the calls that ended, then let asks through in their order; see `Answer`."""
        now = self._clock()
        for call in settled:
            self._reserved -= call.estimate
            self._spent += call.actual
            self._limiter.correct(call.actual.tokens - call.estimate.tokens)
        # a desk that was restarted does not know what was reserved before
        self._reserved = self._reserved.or_more(NOTHING)
        if pause_s:
            self._limiter.pause(now + pause_s)
        self._keep(now)
        turns: list[float | str] = []
        for ask in asks:
            turn = self._turn(ask, now)
            if isinstance(turn, float) and turn > HORIZON_S:
                return Answer(turns=tuple(turns), nap_s=turn - HORIZON_S)
            turns.append(turn)
        return Answer(turns=tuple(turns))

    def close(self) -> Spending:
        """Write the ledger; gives all that was ever spent."""
        if self._ledger:
            write_ledger(self._ledger, self._spent)
        return self._spent

    def _turn(self, ask: Ask, now: float) -> float | str:
        """Seconds until the ask may start, reserved if they are few; or why it never may."""
        # with `finish`, episodes in flight may exceed the budget: it is asked at their start only
        if not ask.again and self._budget.at_limit == "abandon":
            refusal = self._budget.refusal(self._spent + self._reserved, ask.estimate)
            if refusal:
                return refusal
        wait_s = self._limiter.next_start(now) - now
        if wait_s <= HORIZON_S:
            self._limiter.reserve(now, 0 if ask.again else ask.estimate.tokens)
            if not ask.again:
                self._reserved += ask.estimate
        return wait_s

    def _keep(self, now: float) -> None:
        is_due = self._spent != self._written and now - self._written_at >= LEDGER_EVERY_S
        if self._ledger and is_due:
            write_ledger(self._ledger, self._spent)
            self._written, self._written_at = self._spent, now


def read_ledger(path: Path) -> Spending:
    """What a ledger says was spent; nothing when there is none.

    Raises:
        DataError: the file is no ledger; deleting it forgets what no trajectory shows.
    """
    pull(path)
    if not path.is_file():
        return Spending()
    record = read_json(path)
    try:
        return Spending(
            calls=int(record["calls"]), tokens=int(record["tokens"]), money=float(record["money"])
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise DataError(f"file {str(path)!r}: not a ledger of teacher calls; delete it") from exc


def write_ledger(path: Path, spent: Spending) -> None:
    """Write a ledger, whole or not at all."""
    write_json(path, asdict(spent))
