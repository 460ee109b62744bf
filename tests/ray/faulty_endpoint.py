"""A chat endpoint on a real socket that plays ALFWorld badly and fails in every way it knows.

It keeps count: calls, faults, episodes that were begun, and calls that somebody still waits for.
"""

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter

TRY_TIMEOUT_S = 4.0
"""What the clients of the tests wait for one try."""


class FaultyEndpoint:
    """A context in which the endpoint answers.

    Args:
        share: of the calls that go wrong, each by one of `faults`.
        latency_s: of a good answer.
        faults: names of the methods below, without the underscore.
    """

    FAULTS = (
        *("busy", "broken", "slow", "hang", "drop", "reset", "malformed", "whitespace"),
        *("words", "empty", "long"),
    )

    def __init__(self, *, share=0.0, latency_s=0.0, faults=FAULTS, seed=0):
        self._share, self._latency_s, self._faults = share, latency_s, faults
        self._random = random.Random(seed)
        self.calls, self.faults, self.begun = Counter(), Counter(), Counter()
        self.waiting, self.seconds = Counter(), []

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        start = asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1000)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_):
        async def stop():
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def redone(self):
        """Episodes that were begun more than once, each further time."""
        return self.begun.total() - len(self.begun)

    def nobody_waits(self, session, within_s):
        """Whether the calls of an episode have all gone; waits for it a little."""
        deadline = time.monotonic() + within_s
        while self.waiting[session] and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.waiting[session]

    async def _connection(self, reader, writer):
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # nobody listens any more
        finally:
            writer.close()

    async def _request(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(re.search(r"content-length: (\d+)", head)[1])
        session = re.search(r"x-session-id: (\S+)", head)[1]
        body = json.loads(await reader.readexactly(size))
        self.calls[session] += 1
        if _is_student(body) and len(body["messages"]) == 2:
            self.begun[session] += 1
        self.waiting[session] += 1
        started = time.monotonic()
        try:
            return await self._answer(reader, writer, body, session)
        finally:
            self.waiting[session] -= 1
            self.seconds.append(time.monotonic() - started)

    async def _answer(self, reader, writer, body, session):
        if self._random.random() < self._share:
            fault = self._random.choice(self._faults)
            self.faults[fault] += 1
            return await getattr(self, f"_{fault}")(reader, writer)
        await asyncio.sleep(self._latency_s)
        text = (
            student(body["messages"]) if body["model"].startswith("student") else teacher(session)
        )
        return await _reply(writer, _completion(text))

    # Faults of the machinery

    async def _busy(self, reader, writer):
        error = {"error": {"message": "slow down"}}
        return await _reply(writer, error, "429 Too Many Requests", "retry-after: 0.3\r\n")

    async def _broken(self, reader, writer):
        return await _reply(writer, {"error": {"message": "oops"}}, "500 Internal Server Error")

    async def _slow(self, reader, writer):
        try:
            await asyncio.wait_for(reader.read(1), 2 * TRY_TIMEOUT_S)  # ends when nobody waits
        except TimeoutError:
            await _reply(writer, _completion("too late"))
        return False

    async def _hang(self, reader, writer):
        await reader.read(1)
        return False

    async def _drop(self, reader, writer):
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"id": ')
        await writer.drain()
        return False

    async def _reset(self, reader, writer):
        writer.transport.abort()
        return False

    async def _malformed(self, reader, writer):
        return await _reply(writer, b'{"choices": [{"index": 0, ')

    async def _whitespace(self, reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n%s\r\n" % (2**16, b" " * 2**16)
        while True:
            writer.write(chunk)
            await writer.drain()

    # Faults of the model

    async def _words(self, reader, writer):
        return await _reply(writer, _completion('Hm. {"verdict": '))

    async def _empty(self, reader, writer):
        return await _reply(writer, _completion(""))

    async def _long(self, reader, writer):
        return await _reply(writer, _completion("and " * 20_000, "length"))


def _is_student(body):
    """Its name may say on which node it was asked."""
    return body["model"].startswith("student")


def _completion(text, finish_reason="stop"):
    message = {"role": "assistant", "content": text}
    return {
        **{"id": "1", "object": "chat.completion", "created": 0, "model": "m"},
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


async def _reply(writer, answer, status="200 OK", headers=""):
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


def student(messages):
    """Walks from place to place."""
    places = re.findall(r"\ba ([a-z]+ \d+)", messages[1]["content"])
    turn = sum(message["role"] == "assistant" for message in messages)
    return f"Thought: I look there.\nAction: go to {places[turn % len(places)]}"


def teacher(session):
    """Every third episode, the first step was wrong."""
    if sum(session.encode()) % 3:
        return json.dumps({"verdict": "good", "reflection": "", "thought": "", "action": ""})
    mended = {"reflection": "I ran off.", "thought": "First look.", "action": "look"}
    return json.dumps({"verdict": "error", **mended})
