"""What stands before the routes: keys, the size of a request, and the count of what happened.

Plain ASGI middleware, so that it holds for every path, those of the documentation and those that do
not exist too, and so that nothing of a refused request is read.
"""

import hashlib
import hmac
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from step_ray.serving.api.errors import ApiError
from step_ray.serving.api.metrics import ServeMetrics

OPEN_PATHS = frozenset({"/health"})
"""Paths that ask for no key."""


def key_digest(api_key: str) -> str:
    """SHA-256 of an API key, so that replicas need not hold the key itself."""
    return hashlib.sha256(api_key.encode()).hexdigest()


class KeyGuard:
    """Lets in who sends one of the keys; without keys, everybody.

    Args:
        app: what is guarded.
        digests: `key_digest` of each key.
    """

    def __init__(self, app: ASGIApp, digests: Sequence[str]) -> None:
        self._app, self._digests = app, digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        guarded = scope["type"] == "http" and _path(scope) not in OPEN_PATHS
        if guarded and self._digests and not self._is_known(Headers(scope=scope)):
            refusal = ApiError(401, "wrong or missing API key", code="invalid_api_key")
            await refusal.response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = key_digest(key.strip())
        # a list: all are compared, whichever fits
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)


class BodyLimit:
    """Refuses bodies above a size, by their header or, without one, while they are read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        message = f"the request has more than {self._max_bytes} bytes; send less"
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            await ApiError(413, message).response(scope, receive, send)
            return
        num_read = 0

        async def counted() -> Message:
            nonlocal num_read
            part = await receive()
            num_read += len(part.get("body", b""))
            if num_read > self._max_bytes:
                raise HTTPException(413, message)  # FastAPI lets only these through
            return part

        await self._app(scope, counted, send)


class QueueLimit:
    """Refuses requests while too many others are open, for engines that queue without an end.

    Args:
        app: what is guarded.
        most: open requests to let in; negative: no limit.
        retry_after_s: what a client is told to wait.
    """

    def __init__(self, app: ASGIApp, most: int, retry_after_s: int) -> None:
        self._app, self._most, self._retry_after_s = app, most, retry_after_s
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429; what is only read waits for nothing."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if 0 <= self._most <= self._num_open:
            await too_many(self._num_open, self._retry_after_s).response(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1


def too_many(num_open: int, retry_after_s: int) -> ApiError:
    """There is no room in the queue."""
    return ApiError(
        429,
        f"{num_open} prompts are being answered or wait; try again later",
        kind="server_error",
        code="overloaded",
        retry_after_s=retry_after_s,
    )


class Counting:
    """Counts requests by route and status, and how long they took to their last byte."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 499, time.monotonic()  # if it ends without an answer, the client has gone

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count(route, status, time.monotonic() - started)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
