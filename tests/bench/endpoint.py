"""A chat endpoint that costs next to nothing: every call is answered after a fixed time.

`python tests/bench/endpoint.py --latency 1 --port 0` prints its port. POST anything and after
`latency` seconds the same completion comes; GET /stats gives what was counted. It stands for an
engine that is never the limit, so what is lost is lost by the client.
"""

import argparse
import asyncio
import json
import sys
import time

TEXT = "Thought: I look around, because I do not know yet where things are.\nAction: look"
USAGE = {"prompt_tokens": 500, "completion_tokens": 20, "total_tokens": 520}
CHOICE = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
ANSWER = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": USAGE}


def reply(record: object) -> bytes:
    body = json.dumps(record).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


COMPLETION = reply({**ANSWER, "choices": [CHOICE]})


class Stats:
    """When calls came, and how many waited at most."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.in_flight = self.most = 0

    def record(self) -> dict[str, object]:
        return {"arrivals": self.arrivals, "most": self.most, "cpu_s": time.process_time()}


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after the other."""

    def __init__(self, stats: Stats, latency: float) -> None:
        self._stats, self._latency = stats, latency
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).lower()
            place = head.find(b"content-length:")
            length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            del self._data[: end + 4 + length]
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        stats = self._stats
        if head.startswith(b"get"):
            self._transport.write(reply(stats.record()))
            stats.arrivals, stats.most = [], 0
            return
        stats.arrivals.append(time.time())
        stats.in_flight += 1
        stats.most = max(stats.most, stats.in_flight)
        asyncio.get_running_loop().call_later(self._latency, self._send)

    def _send(self) -> None:
        self._stats.in_flight -= 1
        if not self._transport.is_closing():
            self._transport.write(COMPLETION)


async def serve(port: int, latency: float) -> None:
    stats, loop = Stats(), asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(stats, latency), "127.0.0.1", port, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)  # until whoever started it is gone


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.latency))
