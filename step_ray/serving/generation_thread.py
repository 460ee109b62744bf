"""A `BatchGenerator` on a thread of its own, for callers on event loops.

Takes prompts as they come, gives each its text piece by piece or at the end. A caller that goes
away frees its place in the batch. It renders nothing and knows nothing of HTTP.

`@serve.batch` is not used: it closes a batch after a fixed wait even while the last one still runs,
and so many clients that wait for each answer end up in batches of one.
"""

import asyncio
import ctypes
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import torch

from step_ray.serving.generation import BatchGenerator, Generated, SamplingParams


class Pending:
    """One prompt on its way through the batch; made by `GenerationThread.submit` only.

    Its methods belong to the event loop that submitted it.
    """

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        in_pieces: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self.prompt, self.params, self.in_pieces = prompt, params, in_pieces
        self.loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else self.loop.time() + timeout_s
        self._result: asyncio.Future[Generated] = self.loop.create_future()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._num_shown = 0

    @property
    def is_gone(self) -> bool:
        """Nobody waits for the answer any more."""
        return self._result.cancelled()

    def cancel(self) -> None:
        """Leave the batch; an answer that is there stays."""
        self._result.cancel()

    def on_end(self, callback: Callable[[object], None]) -> None:
        """Call back once there is an answer, an error, or nobody who waits."""
        self._result.add_done_callback(callback)

    async def result(self) -> Generated:
        """The whole answer; a caller that is cancelled here leaves the batch.

        Raises:
            TimeoutError: it took too long; the prompt has left the batch.
        """
        async with asyncio.timeout_at(self._deadline):
            return await self._result

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it is generated (`in_pieces`); then `result` has the rest to say.

        Closing the iterator early leaves the batch.

        Raises:
            TimeoutError: see `result`.
        """
        try:
            while True:
                async with asyncio.timeout_at(self._deadline):
                    piece = await self._pieces.get()
                if piece is None:
                    return
                yield piece
        finally:
            self.cancel()

    def _show(self, piece: str) -> None:
        if piece:
            self._num_shown += len(piece)
            self._pieces.put_nowait(piece)

    def _end(self, outcome: Generated | Exception) -> None:
        if self._result.done():
            return
        if isinstance(outcome, Generated):
            self._show(outcome.text[self._num_shown :])
            self._result.set_result(outcome)
        else:
            self._result.set_exception(outcome)
            self._result.exception()  # asked for, so that a caller who left causes no warning
        self._pieces.put_nowait(None)


_Event = tuple[Pending, str | Generated | Exception]


class GenerationThread:
    """Runs a `BatchGenerator`; requests join its batch as they come.

    Args:
        generator: used by this thread only from now on.
        max_batch_size: rows at once; more requests wait.
        batch_wait_s: how long an idle thread gathers requests before it starts.
        num_threads: torch threads of this thread.
    """

    def __init__(
        self,
        generator: BatchGenerator,
        *,
        max_batch_size: int,
        batch_wait_s: float,
        num_threads: int,
    ) -> None:
        self._generator = generator
        self._max_batch_size = max_batch_size
        self._batch_wait_s = batch_wait_s
        self._num_threads = num_threads
        self._waiting: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._running: dict[int, Pending] = {}
        self._is_closing = False
        self.num_open = 0
        """Requests that have no answer yet."""
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """It was closed, and what it was asked is answered."""
        return not self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        in_pieces: bool = False,
        timeout_s: float | None = None,
    ) -> Pending:
        """Let a prompt join those of other callers; to be called on an event loop.

        Args:
            prompt: token ids.
            params: how it is continued.
            in_pieces: `Pending.pieces` is wanted.
            timeout_s: for the answer, the wait for a place included; None: no limit.
        """
        pending = Pending(prompt, params, in_pieces=in_pieces, timeout_s=timeout_s)
        self.num_open += 1
        pending.on_end(self._close_one)
        self._waiting.put(pending)
        return pending

    async def generate(self, prompt: list[int], params: SamplingParams) -> Generated:
        """Continue one prompt together with those of other callers."""
        return await self.submit(prompt, params).result()

    def close(self) -> None:
        """End the thread once all requests made so far are answered."""
        self._waiting.put(None)

    def _close_one(self, result: object) -> None:
        del result
        self.num_open -= 1

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        while not self._is_closing or self._running:
            try:
                self._drop_gone()
                self._admit(self._next())
                self._hand_out(self._generator.step())
            except Exception as exc:  # whoever waits must hear of it, and the thread must go on
                self._fail(exc)
        self._generator.free()
        _give_back()

    def _drop_gone(self) -> None:
        gone = {ticket for ticket, pending in self._running.items() if pending.is_gone}
        if gone:
            self._generator.drop(gone)
            for ticket in gone:
                del self._running[ticket]

    def _next(self) -> list[Pending]:
        """Requests that fit into the batch; waits for one when there is nothing to do."""
        found: list[Pending] = []
        if not self._running and not self._is_closing:
            self._collect(found, block=True)
            time.sleep(self._batch_wait_s)
        while len(self._running) + len(found) < self._max_batch_size and not self._waiting.empty():
            self._collect(found, block=False)
        return found

    def _collect(self, found: list[Pending], *, block: bool) -> None:
        pending = self._waiting.get(block=block)
        if pending is None:
            self._is_closing = True
        elif not pending.is_gone:
            found.append(pending)

    def _admit(self, new: list[Pending]) -> None:
        try:
            tickets = self._generator.add([p.prompt for p in new], [p.params for p in new])
        except Exception:
            self._running.update(enumerate(new, start=-len(new)))  # so that they fail as well
            raise
        self._running.update(zip(tickets, new, strict=True))

    def _hand_out(self, finished: list[tuple[int, Generated]]) -> None:
        wanted = {ticket for ticket, pending in self._running.items() if pending.in_pieces}
        pieces = self._generator.new_text(wanted)
        events: list[_Event] = [(self._running[ticket], piece) for ticket, piece in pieces if piece]
        events += [(self._running.pop(ticket), answer) for ticket, answer in finished]
        _send(events)

    def _fail(self, exc: Exception) -> None:
        self._generator.drop_all()
        _send([(pending, exc) for pending in self._running.values()])
        self._running.clear()


def _give_back() -> None:
    """Let the system have the memory that was freed: glibc keeps it, and a replica to which one
    model after the other is deployed would grow with each."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _send(events: list[_Event]) -> None:
    """Hand events over to the loops that wait for them, in one call for each loop."""
    by_loop = defaultdict(list)
    for event in events:
        by_loop[event[0].loop].append(event)
    for loop, mine in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, mine)
        except RuntimeError:  # the loop is closed, and its callers with it
            continue


def _deliver(events: list[_Event]) -> None:
    for pending, event in events:
        if isinstance(event, str):
            pending._show(event)
        else:
            pending._end(event)
