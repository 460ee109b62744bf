"""A limit on how much an endpoint may send in answer to one request.

Takes nothing, gives an HTTP client for openai that stops reading a reply which never ends (some
engines fill structured output with white space for ever); the time limit of a try alone would let
gigabytes in. It knows nothing of what a reply means.
"""

from collections.abc import AsyncIterator

import httpx2
import openai

MAX_REPLY_BYTES = 4 * 1024**2
"""Of the body, as it comes over the wire: a thousand times what a long turn has."""


class ReplyTooLongError(Exception):
    """The endpoint sent more than `MAX_REPLY_BYTES` and was cut off."""


class _CutStream(httpx2.AsyncByteStream):
    """A body that ends with an error where it grows too long."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for chunk in self._stream:
            num_bytes += len(chunk)
            if num_bytes > MAX_REPLY_BYTES:
                raise ReplyTooLongError(f"the reply has more than {MAX_REPLY_BYTES:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _cut(response: httpx2.Response) -> None:
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _CutStream(response.stream)


def limited_client(timeout_s: float) -> httpx2.AsyncClient:
    """The HTTP client of openai (proxies of the environment, its pool) with cut replies.

    Over aiohttp: the pool of httpx looks at every connection for each request, which with 64 in
    flight is a quarter of a call's CPU time.

    Args:
        timeout_s: for connecting and for each read.
    """
    # uncompressed: a few bytes on the wire may unpack to gigabytes
    return openai.DefaultAioHttpClient(
        timeout=timeout_s, headers={"accept-encoding": "identity"}, event_hooks={"response": [_cut]}
    )
