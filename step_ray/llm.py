"""Chat models: one async client for every OpenAI-compatible endpoint, and a scripted one.

Takes messages, gives a `Completion`; it never looks into the text. Retries are counted and
returned, so that nothing is sent again unseen. What an endpoint says in an error is shown without
the key.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import quote

import openai

from step_ray.calls.endpoint import (
    NO_KEY,
    Failure,
    failure_of,
    is_refusal,
    retry_after_s,
    shown,
    words_of,
)
from step_ray.calls.gate import Gate, OpenGate
from step_ray.calls.reply import Reply, why_not
from step_ray.calls.replylimit import ReplyTooLongError, limited_client
from step_ray.calls.request import RequestForm
from step_ray.calls.spending import NOTHING, Spending
from step_ray.collection.teacher_config import Price
from step_ray.errors import ConfigError, ContextLengthError, LLMError
from step_ray.types import Message

CHARS_PER_TOKEN = 3
"""English has about 4: an estimate on the high side, corrected when the answer comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer of a chat model."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    """`stop`, or `length` when max_tokens cut the answer."""
    retries: int = 0
    """Requests that were sent again before this answer came."""
    cost: float = 0.0
    """Money, by the price that the client was given."""
    unstructured: bool = False
    """A schema was asked for and left out, because the endpoint has no structured output."""
    cached: bool = False
    """Read from the disk: nothing was sent, and the tokens were paid for before."""


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


class Deadline:
    """The time of one call; it stands still while the call waits for its turn."""

    def __init__(self, seconds: float | None) -> None:
        self._left = math.inf if seconds is None else seconds
        self.scope = asyncio.timeout(None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block; when none is left, the scope ends by TimeoutError."""
        now = asyncio.get_running_loop().time
        started = now()
        if not math.isinf(self._left):
            self.scope.reschedule(started + self._left)
        try:
            yield
        finally:
            self._left -= now() - started
            if not self.scope.expired():
                self.scope.reschedule(None)


class _BadAnswerError(Exception):
    """A success by its status that holds no chat completion."""


class _FormError(Exception):
    """The endpoint refuses the form of the request, which was mended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What is sent, as often as it has to be."""

    body: dict[str, Any]
    headers: dict[str, str]
    estimate: Spending
    """What it may cost."""


class OpenAIChat:
    """A model behind `<base_url>/chat/completions`.

    The HTTP client belongs to the event loop that makes the first call, so build one object per
    loop (the object itself may be built anywhere).

    Args:
        base_url: the endpoint.
        model: what to ask it for.
        api_key: sent with each request, shown nowhere.
        timeout_s: for one try.
        call_timeout_s: for a call with its retries, but not its waits for the gate or for what
            Retry-After asks; None: the caller's business.
        max_retries: tries after the first one.
        max_concurrency: calls at once.
        price: what its tokens cost.
        gate: asked before each request, see gate.py.
        extra_body: fields over ours, see `TeacherConfig.extra_body`.

    `refusal` is one line once an endpoint that has never answered refuses the key or the model:
    no other call can fare better.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key: str = NO_KEY,
        timeout_s: float = 120.0,
        call_timeout_s: float | None = None,
        max_retries: int = 5,
        max_concurrency: int = 64,
        price: Price | None = None,
        gate: Gate | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = model
        self.refusal = ""
        self._has_answered = False
        self._base_url, self._api_key = base_url, api_key
        self._timeout_s, self._call_timeout_s = timeout_s, call_timeout_s
        self._max_retries, self._max_concurrency = max_retries, max_concurrency
        self._price, self._gate = price, gate or OpenGate()
        self._form = RequestForm(extra_body)
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
        """Send one request; see `ChatModel.complete`.

        Raises:
            BudgetError: the gate has nothing left to spend.
        """
        body = self._form.body(
            self.name,
            messages,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            json_schema=json_schema,
        )
        chars = sum(len(message.content) for message in messages)
        headers = {} if session_id is None else {"x-session-id": quote(session_id, safe="/#: ")}
        estimate = self._spending(-(-chars // CHARS_PER_TOKEN), max_tokens)
        completion = await self._call(_Request(body=body, headers=headers, estimate=estimate))
        wanted = json_schema is not None
        return replace(completion, unstructured=wanted and "response_format" not in body)

    async def _call(self, request: _Request) -> Completion:
        """One call: its slot, its deadline, its share of the budget."""
        client, slots = self._open()
        deadline = Deadline(self._call_timeout_s)
        async with slots:
            await self._gate.enter(request.estimate)
            actual = NOTHING
            try:
                async with deadline.scope:
                    completion, actual = await self._answer(client, request, deadline)
                    return completion
            except TimeoutError:
                if not deadline.scope.expired():
                    raise
                seconds = self._call_timeout_s
                raise LLMError(
                    f"{self.name} at {self._base_url}: no answer within {seconds:g} s"
                ) from None
            finally:
                self._gate.leave(request.estimate, actual)

    def _spending(self, prompt_tokens: int, completion_tokens: int) -> Spending:
        money = self._price.of(prompt_tokens, completion_tokens) if self._price else 0.0
        return Spending(calls=1, tokens=prompt_tokens + completion_tokens, money=money)

    def _open(self) -> tuple[openai.AsyncOpenAI, asyncio.Semaphore]:
        if self._client is None or self._slots is None:
            self._client = openai.AsyncOpenAI(
                base_url=self._base_url,
                api_key=self._api_key,
                timeout=self._timeout_s,
                max_retries=0,  # retries are ours, because they are counted and shown
                http_client=limited_client(self._timeout_s),
            )
            self._slots = asyncio.Semaphore(self._max_concurrency)
        return self._client, self._slots

    async def _answer(
        self, client: openai.AsyncOpenAI, request: _Request, deadline: Deadline
    ) -> tuple[Completion, Spending]:
        """The answer with what it cost; asked in another form where the endpoint refuses one."""
        num_forms = 0
        while True:
            try:
                reply, tries = await self._send(client, request, deadline)
                break
            except _FormError:
                num_forms += 1
                await self._gate.enter(request.estimate, again=True)
        tries += num_forms
        usage = reply.usage
        if usage is None:  # nobody says what it cost
            return _to_completion(reply, tries, request.estimate.money), request.estimate
        spent = self._spending(usage.prompt_tokens, usage.completion_tokens)
        return _to_completion(reply, tries, spent.money), spent

    async def _send(
        self, client: openai.AsyncOpenAI, request: _Request, deadline: Deadline
    ) -> tuple[Reply, int]:
        """The first answer of the endpoint and the number of tries that failed before it."""
        for attempt in range(self._max_retries + 1):
            try:
                with deadline.running():
                    return await self._try(client, request), attempt
            except (openai.APIError, _BadAnswerError) as exc:
                self._raise_if_final(exc, attempt, request.body)
                asked_s = retry_after_s(exc)
            if asked_s:
                self._gate.pause(asked_s)
                await asyncio.sleep(asked_s)
            with deadline.running():
                await asyncio.sleep(min(30.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5))
            await self._gate.enter(request.estimate, again=True)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _try(self, client: openai.AsyncOpenAI, request: _Request) -> Reply:
        """One request; the client's own timeout is per read, which an endpoint can stretch."""
        scope = asyncio.timeout(self._timeout_s)
        try:
            async with scope:
                # not chat.completions.create: it walks through all messages to rename keys, which
                # costs a third of a turn's CPU time
                record = await client.post(
                    "/chat/completions",
                    cast_to=object,
                    body=request.body,
                    options={"headers": request.headers},
                )
            reply = Reply.read(record)
        except TimeoutError:
            if not scope.expired():
                raise
            raise _BadAnswerError(f"no answer within {self._timeout_s:g} s") from None
        except ValueError as exc:
            raise _BadAnswerError(f"no chat completion ({why_not(exc)})") from None
        except ReplyTooLongError as exc:
            raise _BadAnswerError(str(exc)) from None
        self._has_answered = True
        return reply

    def _raise_if_final(self, exc: Exception, attempt: int, body: dict[str, Any]) -> None:
        """Raise when the same again cannot help. Nothing is chained: the cause may hold the key."""
        line = shown(words_of(exc), self._api_key)
        what = failure_of(exc)
        if what is Failure.CONTEXT:
            raise ContextLengthError(f"{self.name}: {line}") from None
        if self._form.mend(body, what):
            raise _FormError from None
        where = f"{self.name} at {self._base_url}"
        if what is not Failure.PASSING:
            fault = f"{where}: HTTP {getattr(exc, 'status_code', '?')}: {line}"
            if is_refusal(exc) and not self._has_answered:
                self.refusal = fault
            raise LLMError(fault) from None
        if attempt == self._max_retries:
            raise LLMError(f"{where}: gave up after {attempt + 1} tries: {line}") from None

    async def aclose(self) -> None:
        """Close the HTTP client if a call opened it."""
        if self._client is not None:
            await self._client.close()
            self._client = self._slots = None


def _to_completion(reply: Reply, retries: int, cost: float) -> Completion:
    choice, usage = reply.choices[0], reply.usage
    return Completion(
        text=choice.message.content or "",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        finish_reason=choice.finish_reason or "stop",
        retries=retries,
        cost=cost,
    )


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
