"""A loaded model that answers: prompts from text, answers from the batch, a player of episodes.

Takes messages or token ids, gives `api.backend.Answering`. Prompts come from the same `Renderer` as
training examples, so what is served is what was trained. It knows nothing of HTTP or Ray.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

from step_ray.errors import ContextLengthError, DataError
from step_ray.llm import Completion
from step_ray.render import Renderer
from step_ray.serving.api.backend import Answer
from step_ray.serving.generation import SamplingParams
from step_ray.serving.generation_thread import GenerationThread, Pending
from step_ray.types import Message

LONG_TEXT = 20_000
"""Characters from which on a text is made to tokens beside the event loop."""


def new_tokens(
    wanted: int | None, num_prompt: int, max_length: int, most: int | None = None
) -> int:
    """New tokens for a prompt; without a wish all that fit, `most` at most.

    Raises:
        ContextLengthError: the prompt and the tokens asked for (at least one) do not fit. As OpenAI
            and vLLM do, an explicit limit is never lowered.
    """
    room = max_length - num_prompt
    if room < (wanted or 1):
        raise ContextLengthError(
            f"this model's maximum context length is {max_length} tokens, but {num_prompt} prompt "
            f"tokens and {wanted or 1} new tokens were requested; shorten one of them"
        )
    return wanted or min(room, most or room)


class LocalAnswer:
    """One prompt in the batch, as `api.backend.Answering`."""

    def __init__(self, pending: Pending, on_answer: Callable[[Answer], None]) -> None:
        self._pending, self._on_answer = pending, on_answer

    def pieces(self) -> AsyncIterator[str]:
        """See `Answering`."""
        return self._pending.pieces()

    async def answer(self) -> Answer:
        """See `Answering`."""
        result = await self._pending.result()
        answer = Answer(
            text=result.text,
            finish_reason=cast(Literal["stop", "length"], result.finish_reason),
            prompt_tokens=len(self._pending.prompt),
            completion_tokens=len(result.ids),
            cached_tokens=result.cached_tokens,
            token_ids=result.ids,
        )
        self._on_answer(answer)
        return answer

    def cancel(self) -> None:
        """See `Answering`."""
        self._pending.cancel()


class LocalModel:
    """A model ready to answer.

    Args:
        name: under which it is served.
        renderer: messages -> token ids.
        thread: generates; this object closes it.
        max_length: context in tokens.
        timeout_s: for one answer.
        on_answer: called with every answer.
    """

    def __init__(
        self,
        *,
        name: str,
        renderer: Renderer,
        thread: GenerationThread,
        max_length: int,
        timeout_s: float,
        on_answer: Callable[[Answer], None],
    ) -> None:
        self.name, self.max_length, self.thread = name, max_length, thread
        self._renderer, self._timeout_s, self._on_answer = renderer, timeout_s, on_answer
        self._num_users = 0
        self._is_closing = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the model while it may get further prompts, even when another one replaces it."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            self._close_if_free()

    def close(self) -> None:
        """Let it go once nobody uses it; what it was asked is answered."""
        self._is_closing = True
        self._close_if_free()

    def _close_if_free(self) -> None:
        if self._is_closing and not self._num_users:
            self.thread.close()

    async def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation with its generation prompt.

        Raises:
            TemplateError, DataError: it cannot be rendered.
        """
        size = sum(len(message.content) for message in messages)
        return await _beside(size, lambda: self._renderer.render_prompt(messages))

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text as it is, special tokens in it included; ids are checked.

        Raises:
            DataError: no tokens, or an id that the tokenizer does not have.
        """
        tokenizer = self._renderer.tokenizer
        if isinstance(prompt, str):
            ids = await _beside(len(prompt), lambda: list(tokenizer.encode(prompt)))
        else:
            ids = prompt
        size = len(tokenizer)
        if not ids or max(ids) >= size:
            raise DataError(f"prompt: it needs at least one token, each with an id below {size}")
        return ids

    def start(
        self, prompt: list[int], params: SamplingParams, *, in_pieces: bool = False
    ) -> LocalAnswer:
        """Let a prompt join the batch."""
        pending = self.thread.submit(prompt, params, in_pieces=in_pieces, timeout_s=self._timeout_s)
        return LocalAnswer(pending, self._on_answer)


async def _beside(size: int, work: Callable[[], list[int]]) -> list[int]:
    return await asyncio.to_thread(work) if size > LONG_TEXT else work()


class LocalStudent:
    """The model as the player of episodes (`llm.ChatModel`), without HTTP in between."""

    def __init__(self, model: LocalModel) -> None:
        self.name = model.name
        self._model = model

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
        """Answer the conversation; see `ChatModel.complete`."""
        assert json_schema is None, "the student is asked for no schema"
        prompt = await self._model.render(messages)
        limit = new_tokens(max_tokens, len(prompt), self._model.max_length)
        params = SamplingParams(max_tokens=limit, temperature=temperature, seed=seed)
        answer = await self._model.start(prompt, params).answer()
        return answer.to_completion()

    async def aclose(self) -> None:
        """Nothing to close."""
