"""Chat models: one async client for every OpenAI-compatible endpoint, and a scripted one.

Takes messages, gives a `Completion`; it never looks into the text. Retries are counted and
returned, so that nothing is sent again unseen.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import openai

from step_ray.errors import ConfigError, ContextLengthError, EndpointError, LLMError
from step_ray.types import Message

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer of a chat model."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    """`stop`, or `length` when max_tokens cut the answer."""
    retries: int = 0


class ChatModel(Protocol):
    """What the episode loop and the teacher need from a language model."""

    name: str

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        session_id: str | None = None,
        json_schema: dict[str, Any] | None = None,
    ) -> Completion:
        """Answer the conversation.

        `session_id` keeps an episode on the replica that holds its prefix; `json_schema` asks for
        structured output where the endpoint has it.

        Raises:
            ContextLengthError: the prompt does not fit the model.
            LLMError: the call failed after its retries.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class OpenAIChat:
    """A model behind `<base_url>/chat/completions`.

    The HTTP client belongs to the event loop that makes the first call, so build one object per
    loop (the object itself may be built anywhere).
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str = "none",
        timeout_s: float = 120.0,
        max_retries: int = 5,
        max_concurrency: int = 64,
    ) -> None:
        self.name = model
        self._settings = {"base_url": base_url, "api_key": api_key, "timeout": timeout_s}
        self._base_url = base_url
        self._max_retries = max_retries
        self._max_concurrency = max_concurrency
        self._client: openai.AsyncOpenAI | None = None
        self._slots: asyncio.Semaphore | None = None

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        session_id: str | None = None,
        json_schema: dict[str, Any] | None = None,
    ) -> Completion:
        """Send one request; see `ChatModel.complete`."""
        request: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if seed is not None:
            request["seed"] = seed
        if session_id is not None:
            request["extra_headers"] = {"x-session-id": session_id}
        if json_schema is not None:
            request["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        client, slots = self._open()
        async with slots:
            return await self._send(client, request)

    def _open(self) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        if self._client is None or self._slots is None:
            # max_retries=0: retries are ours, because they are counted and shown
            self._client = openai.AsyncOpenAI(max_retries=0, **self._settings)  # type: ignore[arg-type]
            self._slots = asyncio.Semaphore(self._max_concurrency)
        return self._client, self._slots

    async def _send(self, client: openai.AsyncOpenAI, request: dict[str, Any]) -> Completion:
        for attempt in range(self._max_retries + 1):
            try:
                answer = await client.chat.completions.create(**request)
                return _to_completion(answer, attempt)
            except (openai.APIStatusError, openai.APIConnectionError) as exc:
                wait_s = self._retry_wait_s(exc, attempt)
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _retry_wait_s(
        self, exc: openai.APIStatusError | openai.APIConnectionError, attempt: int
    ) -> float:
        """Seconds to wait before sending again; raises when sending again cannot help."""
        status = exc.status_code if isinstance(exc, openai.APIStatusError) else None
        line = str(exc).splitlines()[0]
        if status == 400 and _is_context_error(exc):
            raise ContextLengthError(f"{self.name}: {line}") from exc
        if status is not None and status not in RETRIED_STATUS:
            raise LLMError(f"{self.name} at {self._base_url}: HTTP {status}: {line}") from exc
        if attempt == self._max_retries:
            raise LLMError(
                f"{self.name} at {self._base_url}: gave up after {attempt + 1} tries: {line}"
            ) from exc
        retry_after = _retry_after_s(exc)
        backoff: float = min(30.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5)
        return max(backoff, retry_after)

    async def aclose(self) -> None:
        """Close the HTTP client if a call opened it."""
        if self._client is not None:
            await self._client.close()
            self._client = self._slots = None


def _to_completion(answer: Any, retries: int) -> Completion:
    choice = answer.choices[0]
    usage = answer.usage
    return Completion(
        text=choice.message.content or "",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        finish_reason=choice.finish_reason or "stop",
        retries=retries,
    )


def _is_context_error(exc: Exception) -> bool:
    """OpenAI names the code; vLLM says it in words only."""
    text = str(exc).lower()
    named = getattr(exc, "code", None) == "context_length_exceeded"
    return named or "maximum context length" in text or "maximum model length" in text


def _retry_after_s(exc: Exception) -> float:
    response = getattr(exc, "response", None)
    value = response.headers.get("retry-after", "0") if response is not None else "0"
    try:
        return min(60.0, float(value))
    except ValueError:
        return 0.0


def check_endpoint(key: str, base_url: str, model: str, api_key: str, timeout_s: float) -> None:
    """Ask `<base_url>/models` once, so that a wrong address shows before any work is done.

    Raises:
        EndpointError: unreachable, refuses the key, or does not serve `model`.
    """
    try:
        with openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=0
        ) as client:
            names = [m.id for m in client.models.list().data]
    except openai.APIStatusError as exc:
        if exc.status_code == 404:  # an endpoint may have no /models; the first call will tell
            return
        raise EndpointError(
            f"{key}.base_url: {base_url!r} answered HTTP {exc.status_code}; check the key and URL"
        ) from exc
    except openai.APIConnectionError as exc:
        raise EndpointError(
            f"{key}.base_url: {base_url!r} cannot be reached; start the server or mend the URL"
        ) from exc
    except Exception as exc:  # a page that is no JSON, a URL or key that cannot be sent
        raise EndpointError(
            f"{key}.base_url: {base_url!r} gives no OpenAI answer; mend the URL or the key"
        ) from exc
    if names and model not in names:
        raise EndpointError(f"{key}.model: {model!r} is not served at {base_url}; it has {names}")


Script = Sequence[str | Exception] | Callable[[Sequence[Message]], str]


class ScriptedLLM:
    """A chat model that answers from a script: a list in order, or a function of the messages.

    An exception in the list is raised at its turn. A first-class backend: tests and dry runs use
    it in place of a server.
    """

    def __init__(self, script: Script, *, name: str = "scripted") -> None:
        self.name = name
        self.calls: list[tuple[Message, ...]] = []
        self._script = script

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        session_id: str | None = None,
        json_schema: dict[str, Any] | None = None,
    ) -> Completion:
        """Give the next line of the script.

        Raises:
            ConfigError: the script is used up.
        """
        self.calls.append(tuple(messages))
        if callable(self._script):
            return Completion(text=self._script(messages))
        if len(self.calls) > len(self._script):
            raise ConfigError(f"{self.name}: the script has only {len(self._script)} answers")
        answer = self._script[len(self.calls) - 1]
        if isinstance(answer, Exception):
            raise answer
        return Completion(text=answer, completion_tokens=len(answer.split()))

    async def aclose(self) -> None:
        """Nothing to close."""
