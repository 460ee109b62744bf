"""The routes as one FastAPI application over any `Backend`."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from openai.types import Model
from pydantic import BaseModel

from step_ray.serving.api.agent_routes import add_agent_routes
from step_ray.serving.api.answers import (
    ChatForm,
    CompletionForm,
    Form,
    Stream,
    events,
    gather_answers,
)
from step_ray.serving.api.backend import AgentBackend, Answering, Backend
from step_ray.serving.api.checks import check_chat, check_completion
from step_ray.serving.api.errors import add_error_handlers, refused
from step_ray.serving.api.guard import BodyLimit, Counting, KeyGuard
from step_ray.serving.api.metrics import CONTENT_TYPE, ServeMetrics
from step_ray.serving.api.schemas import ChatRequest, CompletionRequest, Sampling
from step_ray.serving.config import ServeConfig


def make_api(
    backend: Backend,
    config: ServeConfig,
    metrics: ServeMetrics,
    key_digests: Sequence[str] = (),
) -> FastAPI:
    """All routes of a backend.

    Args:
        backend: answers.
        config: limits.
        metrics: counts requests; what `/metrics` shows is the backend's.
        key_digests: `guard.key_digest` of the keys of which one must be sent; empty: none.
    """
    api = guarded_api(backend, config, metrics, key_digests)
    add_openai_routes(api, backend, config, metrics)
    return api


def guarded_api(
    backend: AgentBackend,
    config: ServeConfig,
    metrics: ServeMetrics,
    key_digests: Sequence[str] = (),
) -> FastAPI:
    """The routes of the agent, `/health` and `/metrics`, and what guards these and all others.

    See `make_api`; OpenAI's routes are for the caller to add.
    """
    api = FastAPI(title="step_ray agent")
    add_error_handlers(api)
    add_agent_routes(api, backend, config)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/metrics")
    async def counts() -> Response:
        return Response(await backend.metrics(), media_type=CONTENT_TYPE)

    # the last one is the outermost
    api.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    api.add_middleware(KeyGuard, digests=tuple(key_digests))
    api.add_middleware(Counting, metrics=metrics)
    if config.cors_origins:
        # outside the keys, for a browser asks without one whether it may ask
        api.add_middleware(CORSMiddleware, **_cors_options(config))
    return api


def _cors_options(config: ServeConfig) -> dict[str, Any]:
    """What web pages of other origins may do."""
    return {
        "allow_origins": list(config.cors_origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["authorization", "content-type", "x-session-id"],
    }


def add_openai_routes(
    api: FastAPI, backend: Backend, config: ServeConfig, metrics: ServeMetrics
) -> None:
    """Add `/v1/models`, `/v1/chat/completions` and `/v1/completions`."""

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = Model(id=backend.model, created=0, object="model", owned_by="step_ray")
        return {"object": "list", "data": [model.model_dump()]}

    @api.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        check_chat(body, backend.model)
        try:
            answering = await backend.chat(body)
        except Exception as exc:
            raise refused(exc, "messages") from exc
        return await respond(body, [answering], ChatForm(body.model))

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        check_completion(body, backend.model)
        try:
            answering = await backend.complete(body)
        except Exception as exc:
            raise refused(exc, "prompt") from exc
        return await respond(body, answering, CompletionForm(body.model))

    async def respond(body: Sampling, answering: Sequence[Answering], form: Form) -> Response:
        if not body.stream:
            return _json(form.whole(await gather_answers(answering, config.request_timeout_s)))
        started = time.monotonic()
        source = events(
            form,
            answering,
            has_usage=body.has_usage_event,
            timeout_s=config.request_timeout_s,
            on_first=lambda: metrics.first_piece(time.monotonic() - started),
        )
        return Stream(source, "text/event-stream")


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
