"""The agent's own routes: one step (`/v1/agent/act`), and whole episodes (`/v1/episodes`)."""

import json
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from step_ray.react import read_step
from step_ray.serving.api.agent_schemas import ActRequest, EpisodesRequest
from step_ray.serving.api.answers import Stream, gather_answers, new_id, usage_of
from step_ray.serving.api.backend import AgentBackend
from step_ray.serving.api.checks import check_model
from step_ray.serving.api.errors import refused
from step_ray.serving.config import ServeConfig

MEDIA_TYPES = {"ndjson": "application/x-ndjson", "sse": "text/event-stream"}


def add_agent_routes(api: FastAPI, backend: AgentBackend, config: ServeConfig) -> None:
    """Add both routes."""

    @api.post("/v1/agent/act")
    async def act(body: ActRequest) -> Response:
        check_model(body.model, backend.model)
        try:
            answering = await backend.act(body)
        except Exception as exc:
            raise refused(exc, "history") from exc
        (answer,) = await gather_answers([answering], config.request_timeout_s)
        return JSONResponse(
            {
                "id": new_id("act"),
                "object": "agent.act",
                "created": int(time.time()),
                "model": backend.model,
                **read_step(answer.text, before_execution=config.agent.before_execution),
                "finish_reason": answer.finish_reason,
                "token_ids": answer.token_ids,
                "usage": usage_of([answer]).model_dump(),
            }
        )

    @api.post("/v1/episodes")
    async def episodes(body: EpisodesRequest) -> Response:
        check_model(body.model, backend.model)
        try:
            source = await backend.episodes(body)
        except Exception as exc:
            raise refused(exc, "environment") from exc
        return Stream(_lines(source, body.format), media_type=MEDIA_TYPES[body.format])


async def _lines(
    source: AsyncGenerator[dict[str, Any], None], form: str
) -> AsyncGenerator[str, None]:
    """One line (or event) per record; an error that comes too late for a status is one too."""
    async with aclosing(source):
        try:
            async for record in source:
                yield _line(record, form)
        except Exception as exc:
            yield _line(refused(exc, "environment").body, form)


def _line(record: dict[str, Any], form: str) -> str:
    text = json.dumps(_finite(record), allow_nan=False)
    return f"data: {text}\n\n" if form == "sse" else f"{text}\n"


def _finite(value: Any) -> Any:
    """JSON knows no infinity, which is how an interval says that it knows nothing."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
