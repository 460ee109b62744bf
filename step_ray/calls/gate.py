"""The gate that every request to a limited endpoint passes: rate limits and budget of the job.

Takes what a call will cost at most, lets it through when its turn comes, and is told what it did
cost. The counting is done once for the whole job by a desk (desk.py); a gate gathers what its
callers ask while one question is under way, so that the desk gets few messages however many calls
wait. It knows nothing of Ray: how to reach the desk is given to it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from step_ray.calls.spending import NOTHING, Spending
from step_ray.errors import BudgetError, LLMError, StepRayError

LONGEST_NAP_S = 5.0
"""A gate that waits for its turn asks again at least this often: a turn may come sooner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request that wants to start."""

    estimate: Spending
    """What it may cost; reserved until the call is settled."""
    again: bool = False
    """A retry of a call that was let through before: it has its share of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A call that ended."""

    estimate: Spending
    actual: Spending


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a desk says to a list of asks."""

    turns: tuple[float | str, ...]
    """For the first asks: seconds to wait before each starts, or why it never may."""
    nap_s: float = 0.0
    """When to ask again for the rest, seconds."""


Serve = Callable[[Sequence[Ask], Sequence[Settled], float], Awaitable[Answer]]
"""Asks, calls that ended, and how long the endpoint asked everybody to wait (seconds)."""


class Gate(Protocol):
    """What a chat client asks before and tells after a call."""

    async def enter(self, estimate: Spending, *, again: bool = False) -> None:
        """Wait for the turn of a request.

        Raises:
            BudgetError: the budget is spent.
        """
        ...

    def leave(self, estimate: Spending, actual: Spending) -> None:
        """The call that entered with this estimate has ended, and cost this."""
        ...

    def pause(self, seconds: float) -> None:
        """The endpoint wants no request from anybody for so long."""
        ...


class OpenGate:
    """No limit, no budget."""

    async def enter(self, estimate: Spending, *, again: bool = False) -> None:
        """Go through."""

    def leave(self, estimate: Spending, actual: Spending) -> None:
        """Nothing is counted."""

    def pause(self, seconds: float) -> None:
        """Each call waits by itself."""


class TabGate:
    """Calls that wait for nothing, but whose money the desk counts: those of a paid student."""

    def __init__(self, desk: "DeskGate") -> None:
        self._desk = desk

    async def enter(self, estimate: Spending, *, again: bool = False) -> None:
        """Go through."""

    def leave(self, estimate: Spending, actual: Spending) -> None:
        """Told to the desk, the money only: the other limits are the teacher's."""
        if actual.money:
            self._desk.leave(NOTHING, Spending(money=actual.money))

    def pause(self, seconds: float) -> None:
        """Each call waits by itself."""


class DeskGate:
    """One actor's gate to the desk of the job; belongs to one event loop."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._waiting: list[tuple[Ask, asyncio.Future[float]]] = []
        self._settled: list[Settled] = []
        self._pause_s = 0.0
        self._pump: asyncio.Task[None] | None = None

    async def enter(self, estimate: Spending, *, again: bool = False) -> None:
        """Wait for the turn; see `Gate.enter`. A caller that gives up frees what it had."""
        turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((Ask(estimate=estimate, again=again), turn))
        self._wake()
        try:
            await asyncio.sleep(await turn)
        except asyncio.CancelledError:
            had_turn = turn.done() and not turn.cancelled() and turn.exception() is None
            if had_turn and not again:
                self.leave(estimate, NOTHING)
            raise

    def leave(self, estimate: Spending, actual: Spending) -> None:
        """Told to the desk with the next message."""
        self._settled.append(Settled(estimate=estimate, actual=actual))
        self._wake()

    def pause(self, seconds: float) -> None:
        """Told to the desk with the next message."""
        self._pause_s = max(self._pause_s, seconds)
        self._wake()

    async def flush(self) -> None:
        """Wait until the desk knows all."""
        while self._pump is not None and not self._pump.done():
            await asyncio.shield(self._pump)

    def _wake(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._waiting or self._settled or self._pause_s:
            asked, settled, pause_s = self._waiting, self._settled, self._pause_s
            self._waiting, self._settled, self._pause_s = [], [], 0.0
            asked = [(ask, turn) for ask, turn in asked if not turn.done()]
            try:
                answer = await self._serve([ask for ask, _ in asked], settled, pause_s)
            except Exception as exc:
                fault = LLMError(f"the desk that counts teacher calls failed: {_line(exc)}")
                _fail([turn for _, turn in asked], fault)
                continue
            rest = self._tell(asked, answer)
            self._waiting = rest + self._waiting
            if rest:
                await asyncio.sleep(min(answer.nap_s, LONGEST_NAP_S))

    def _tell(
        self, asked: list[tuple[Ask, asyncio.Future[float]]], answer: Answer
    ) -> list[tuple[Ask, asyncio.Future[float]]]:
        """Pass the answer on to those who wait; gives those who wait on."""
        for (ask, turn), got in zip(asked, answer.turns, strict=False):
            if isinstance(got, str):
                _fail([turn], BudgetError(got))
            elif not turn.done():
                turn.set_result(got)
            elif not ask.again:  # it gave up while the question was under way
                self.leave(ask.estimate, NOTHING)
        return asked[len(answer.turns) :]


def _fail(turns: Sequence["asyncio.Future[float]"], error: StepRayError) -> None:
    for turn in turns:
        if not turn.done():
            turn.set_exception(error)


def _line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"
