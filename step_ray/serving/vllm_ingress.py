"""The replica that stands before vLLM: Ray's OpenAI routes and the agent's own, behind our guards.

Takes HTTP requests, asks Ray's LLM deployment, gives its answers; errors leave in our form. It
imports parts of Ray that are not public and that need vLLM: `build_openai_app` has neither keys nor
routes of others, and its errors repeat what they were sent. Tokens are counted by vLLM itself, on
Ray's metrics port.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest as VllmChatRequest,
)
from ray.llm._internal.serve.core.configs.openai_api_models import (
    CompletionRequest as VllmCompletionRequest,
)
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ErrorResponse,
    OpenAIHTTPException,
)
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress
from ray.serve.context import _get_serve_request_context
from starlette.middleware import Middleware

from step_ray.calls.endpoint import CONTEXT_CODE
from step_ray.errors import ContextLengthError
from step_ray.llm import Completion
from step_ray.serving.agent_server import RETRY_AFTER_S
from step_ray.serving.api.acting import act_messages
from step_ray.serving.api.agent_schemas import ActRequest, EpisodesRequest
from step_ray.serving.api.app import guarded_api
from step_ray.serving.api.backend import Answer
from step_ray.serving.api.errors import ApiError, refused
from step_ray.serving.api.guard import QueueLimit
from step_ray.serving.api.metrics import ServeMetrics, exposition
from step_ray.serving.config import ServeConfig
from step_ray.serving.episode_service import EpisodeService
from step_ray.types import Message

TOO_LONG = re.compile(r"context length|longer than|max_model_len")
"""What vLLM says of a prompt that does not fit."""
T = TypeVar("T")


class VllmAnswer:
    """One prompt at vLLM, as `api.backend.Awaited`."""

    def __init__(self, asking: Coroutine[Any, Any, Answer], timeout_s: float) -> None:
        self._task = asyncio.create_task(asking)
        self._timeout_s = timeout_s

    async def answer(self) -> Answer:
        """See `Awaited`."""
        async with asyncio.timeout(self._timeout_s):
            return await self._task

    def cancel(self) -> None:
        """See `Awaited`."""
        self._task.cancel()


class VllmStudent:
    """The served model as the player of episodes (`llm.ChatModel`), without HTTP in between."""

    def __init__(self, backend: "VllmBackend") -> None:
        self.name = backend.model
        self._backend = backend

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
        answer = await self._backend.ask(
            messages,
            session_id,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        return answer.to_completion()

    async def aclose(self) -> None:
        """Nothing to close."""


class VllmBackend:
    """The agent over Ray's LLM deployment, as `api.backend.AgentBackend`.

    Args:
        model: name under which it is served.
        handle: of the deployment; its methods stream.
        config: limits.
        replica: name of this replica among others.
    """

    def __init__(self, model: str, handle: Any, config: ServeConfig, replica: str) -> None:
        self.model = model
        self._handle, self._config = handle, config
        self._num_asked = 0
        self.counts = ServeMetrics(replica, self._num_running, self._num_running)
        self._episodes = EpisodeService(config.agent, self.counts)

    def _num_running(self) -> int:
        """Prompts at vLLM, which batches and queues them itself."""
        return self._num_asked

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Count a prompt while the block runs."""
        self._num_asked += 1
        try:
            yield
        finally:
            self._num_asked -= 1

    async def act(self, request: ActRequest) -> VllmAnswer:
        """See `AgentBackend.act`."""
        agent = self._config.agent
        asking = self.ask(
            act_messages(request, agent.prompt),
            _get_serve_request_context().session_id or None,
            max_tokens=request.max_tokens or agent.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
        )
        return VllmAnswer(asking, self._config.request_timeout_s)

    async def episodes(self, request: EpisodesRequest) -> AsyncGenerator[dict[str, Any], None]:
        """See `AgentBackend.episodes`."""
        return await self._episodes.open(request, VllmStudent(self))

    async def metrics(self) -> bytes:
        """See `AgentBackend.metrics`."""
        return exposition([self.counts.snapshot()])

    async def ask(
        self, messages: Sequence[Message], session_id: str | None, **sampling: Any
    ) -> Answer:
        """The model's answer to a conversation; `sampling` has fields of OpenAI's request.

        Raises:
            ContextLengthError: it does not fit.
            ApiError: vLLM refuses it for another reason.
        """
        body = VllmChatRequest(
            model=self.model,
            messages=[{"role": m.role, "content": m.content} for m in messages],
            return_token_ids=True,
            **sampling,
        )
        limit_tokens(body, "max_completion_tokens", self._config.max_new_tokens)
        handle = self._handle
        if session_id is not None:
            handle = handle.options(session_id=session_id)
        with self.asking():
            async for reply in handle.chat.remote(body, None):
                return _answer(reply)
        raise ApiError(500, "the engine has given no answer", kind="server_error")


@serve.ingress()
class AgentIngress(OpenAiIngress):
    """Ray's ingress of one model, with the agent in it.

    Args:
        llm_deployments: name of the model -> handle of what serves it.
        model_cards: name of the model -> its card.
        config: limits.
        key_digests: `guard.key_digest` of each key.
        most_open: requests at once, those that wait included; negative: no limit.
    """

    def __init__(
        self,
        llm_deployments: dict[str, Any],
        model_cards: dict[str, Any],
        *,
        config: ServeConfig,
        key_digests: Sequence[str],
        most_open: int,
    ) -> None:
        super().__init__(llm_deployments, model_cards)
        self._config, self._key_digests, self._most_open = config, key_digests, most_open
        (name,) = model_cards
        replica = serve.get_replica_context().replica_id.unique_id
        handle = self._get_configured_serve_handle(name)
        self._agent = VllmBackend(name, handle, config, replica)

    def __serve_build_asgi_app__(self) -> FastAPI:
        counts = self._agent.counts
        api = guarded_api(self._agent, self._config, counts, self._key_digests)
        # the innermost: only who has a key takes a place, and who gets none is counted
        limit = Middleware(QueueLimit, most=self._most_open, retry_after_s=RETRY_AFTER_S)
        api.user_middleware.append(limit)
        api.add_exception_handler(OpenAIHTTPException, _rays_error)
        api.get("/v1/models")(self.models)
        api.post("/v1/chat/completions")(self.chat)
        api.post("/v1/completions")(self.completions)
        return api

    async def chat(self, body: VllmChatRequest, request: Request) -> Response:
        """`/v1/chat/completions`, as Ray answers it."""
        limit_tokens(body, "max_completion_tokens", self._config.max_new_tokens)
        return await self._in_time(super().chat(body, request))

    async def completions(self, body: VllmCompletionRequest, request: Request) -> Response:
        """`/v1/completions`, as Ray answers it."""
        limit_tokens(body, "max_tokens", self._config.max_new_tokens)
        return await self._in_time(super().completions(body, request))

    async def _in_time(self, asking: Awaitable[T]) -> T:
        """A whole answer, or the beginning of a stream."""
        timeout_s = self._config.request_timeout_s
        try:
            with self._agent.asking():
                async with asyncio.timeout(timeout_s):
                    return await asking
        except TimeoutError as exc:
            raise refused(exc, "messages", timeout_s) from exc


def limit_tokens(body: Any, name: str, most: int | None) -> None:
    """Hold a request to `most` new tokens; one that asks for no number gets so many at most.

    Raises:
        ApiError: 400, it asks for more.
    """
    if most is None:
        return
    wanted = max(getattr(body, key, None) or 0 for key in ("max_tokens", name))
    if wanted > most:
        raise ApiError(
            400,
            f"max_tokens: {wanted} asked for, this server gives {most} at most",
            param="max_tokens",
        )
    if not wanted:
        setattr(body, name, most)


def _answer(reply: Any) -> Answer:
    """What vLLM says, in our terms."""
    if isinstance(reply, ErrorResponse):
        fault = reply.error
        if fault.code == 400 and TOO_LONG.search(fault.message):
            raise ContextLengthError(fault.message)
        raise _api_error(fault.code, fault.message)
    (choice,), usage = reply.choices, reply.usage
    cached = usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
    return Answer(
        text=choice.message.content or "",
        finish_reason="length" if choice.finish_reason == "length" else "stop",
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or 0,
        cached_tokens=cached or 0,
        token_ids=tuple(choice.token_ids or ()),
    )


def _api_error(status: int, message: str) -> ApiError:
    """An error of Ray or vLLM in our form; those of the server say nothing of what was asked."""
    if status >= 500:
        return ApiError(status, "internal error of the engine", kind="server_error")
    code = CONTEXT_CODE if status == 400 and TOO_LONG.search(message) else None
    return ApiError(status, message, code=code)


async def _rays_error(request: Request, exc: Exception) -> JSONResponse:
    del request
    assert isinstance(exc, OpenAIHTTPException)
    return _api_error(exc.status_code, exc.message).response
