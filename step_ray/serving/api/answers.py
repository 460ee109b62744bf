"""Answers in OpenAI's form: whole, and as the events of a stream.

Takes what a backend gives (`Answering`), gives response objects. It decides nothing about the text.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from fastapi.responses import StreamingResponse
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel
from starlette.types import Send

from step_ray.serving.api.backend import Answer, Answering, Awaited
from step_ray.serving.api.errors import refused

DONE = "data: [DONE]\n\n"


class Form(Protocol):
    """How one of the routes words its answers; choices are numbered as the prompts were."""

    def whole(self, answers: Sequence[Answer]) -> BaseModel:
        """The answer of a request that does not stream."""
        ...

    def opening(self) -> list[BaseModel]:
        """What a stream begins with, before any text."""
        ...

    def piece(self, index: int, text: str) -> BaseModel:
        """Some text of a choice."""
        ...

    def end(self, index: int, answer: Answer) -> BaseModel:
        """The end of a choice."""
        ...

    def usage(self, answers: Sequence[Answer]) -> BaseModel:
        """What the stream cost."""
        ...


class ChatForm:
    """`/v1/chat/completions`: one choice."""

    def __init__(self, model: str) -> None:
        self._fields = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer]) -> BaseModel:
        """See `Form`."""
        (answer,) = answers
        message = ChatCompletionMessage(role="assistant", content=answer.text)
        return ChatCompletion.model_validate(
            {
                **self._fields,
                "object": "chat.completion",
                "choices": [
                    Choice(index=0, message=message, finish_reason=answer.finish_reason),
                ],
                "usage": usage_of(answers),
            }
        )

    def opening(self) -> list[BaseModel]:
        """See `Form`."""
        return [self._chunk(ChoiceDelta(role="assistant", content=""))]

    def piece(self, index: int, text: str) -> BaseModel:
        """See `Form`."""
        return self._chunk(ChoiceDelta(content=text))

    def end(self, index: int, answer: Answer) -> BaseModel:
        """See `Form`."""
        return self._chunk(ChoiceDelta(), answer.finish_reason)

    def usage(self, answers: Sequence[Answer]) -> BaseModel:
        """See `Form`."""
        return self._made(choices=[], usage=usage_of(answers))

    def _chunk(self, delta: ChoiceDelta, reason: str | None = None) -> BaseModel:
        choice = ChunkChoice.model_construct(index=0, delta=delta, finish_reason=reason)
        return self._made(choices=[choice])

    def _made(self, **fields: object) -> BaseModel:
        fields = {**self._fields, "object": "chat.completion.chunk", **fields}
        return ChatCompletionChunk.model_construct(**fields)  # type: ignore[arg-type]


class CompletionForm:
    """`/v1/completions`: one choice per prompt."""

    def __init__(self, model: str) -> None:
        self._fields = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: Sequence[Answer]) -> BaseModel:
        """See `Form`."""
        choices = [
            self._choice(index, answer.text, answer.finish_reason)
            for index, answer in enumerate(answers)
        ]
        return self._made(choices=choices, usage=usage_of(answers))

    def opening(self) -> list[BaseModel]:
        """See `Form`."""
        return []

    def piece(self, index: int, text: str) -> BaseModel:
        """See `Form`."""
        return self._made(choices=[self._choice(index, text, None)])

    def end(self, index: int, answer: Answer) -> BaseModel:
        """See `Form`."""
        return self._made(choices=[self._choice(index, "", answer.finish_reason)])

    def usage(self, answers: Sequence[Answer]) -> BaseModel:
        """See `Form`."""
        return self._made(choices=[], usage=usage_of(answers))

    def _choice(self, index: int, text: str, reason: str | None) -> CompletionChoice:
        # a choice that has not ended has no reason, which the client's own type does not know
        return CompletionChoice.model_construct(
            index=index,
            text=text,
            finish_reason=reason,
            logprobs=None,
        )

    def _made(self, **fields: object) -> BaseModel:
        return Completion.model_construct(**{**self._fields, **fields})  # type: ignore[arg-type]


class Stream(StreamingResponse):
    """A streamed answer; when the client goes away, its source is closed at once."""

    def __init__(self, source: AsyncGenerator[str, None], media_type: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(source, media_type=media_type, headers=headers)
        self._source = source

    async def stream_response(self, send: Send) -> None:
        """Send all there is."""
        async with aclosing(self._source):
            await super().stream_response(send)


async def gather_answers(answering: Sequence[Awaited], timeout_s: float) -> list[Answer]:
    """All answers, or none.

    Raises:
        ApiError: see `errors.refused`.
    """
    try:
        return list(await asyncio.gather(*(one.answer() for one in answering)))
    except Exception as exc:
        raise refused(exc, "messages", timeout_s) from exc
    finally:
        cancel_all(answering)


def cancel_all(answering: Sequence[Awaited]) -> None:
    """Nobody waits for these any more; has no effect on answers that are there."""
    for one in answering:
        one.cancel()


async def events(
    form: Form,
    answering: Sequence[Answering],
    *,
    has_usage: bool,
    timeout_s: float,
    on_first: Callable[[], None],
) -> AsyncGenerator[str, None]:
    """The server-sent events of a stream; an error that comes too late for a status is one too.

    Args:
        form: how they are worded.
        answering: the prompts, one choice each.
        has_usage: tell the usage before the end.
        timeout_s: what the error says of a time-out.
        on_first: called when the first text is there.
    """
    answers: dict[int, Answer] = {}
    try:
        for message in form.opening():
            yield _event(message)
        async with aclosing(_merged(answering)) as merged:
            is_first = True
            async for index, what in merged:
                if isinstance(what, Answer):
                    answers[index] = what
                    yield _event(form.end(index, what))
                    continue
                if is_first:
                    is_first = False
                    on_first()
                yield _event(form.piece(index, what))
        if has_usage:
            yield _event(form.usage([answers[index] for index in sorted(answers)]))
        yield DONE
    except Exception as exc:
        yield refused(exc, "messages", timeout_s).event
    finally:
        cancel_all(answering)


async def _merged(
    answering: Sequence[Answering],
) -> AsyncGenerator[tuple[int, str | Answer], None]:
    """Pieces and answers of all prompts as they come, with the number of the prompt."""
    arrived: asyncio.Queue[tuple[int, str | Answer | Exception]] = asyncio.Queue()

    async def follow(index: int, one: Answering) -> None:
        try:
            async for piece in one.pieces():
                arrived.put_nowait((index, piece))
            arrived.put_nowait((index, await one.answer()))
        except Exception as exc:
            arrived.put_nowait((index, exc))

    tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(answering)]
    try:
        num_left = len(tasks)
        while num_left:
            index, what = await arrived.get()
            if isinstance(what, Exception):
                raise what
            num_left -= isinstance(what, Answer)
            yield index, what
    finally:
        for task in tasks:
            task.cancel()


def usage_of(answers: Sequence[Answer]) -> CompletionUsage:
    """The tokens of all choices together."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def _event(message: BaseModel) -> str:
    return f"data: {message.model_dump_json(exclude_unset=True)}\n\n"
