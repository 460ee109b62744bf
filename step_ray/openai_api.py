"""The OpenAI chat routes as a FastAPI application over any `ChatBackend`.

Takes HTTP requests, gives answers and errors in OpenAI's form. It checks what is asked and who
asks; it knows nothing of models, tokens or Ray. A field that would change the answer and is not
supported is refused, never ignored.
"""

import hashlib
import hmac
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from step_ray.types import Message

Neutral = Annotated[float | None, Field(ge=0, le=0)]
"""A penalty that is accepted at zero only."""


class _Body(BaseModel):
    """Base of request bodies: unknown fields and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def to_message(self) -> Message:
        """The message with its parts joined."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        return Message(role=self.role, content="".join(part.text for part in self.content))


class StreamOptions(_Body):
    """What a stream carries besides the text."""

    include_usage: bool = False


class TextFormat(_Body):
    """The only response format there is."""

    type: Literal["text"]


class ChatRequest(_Body):
    """Body of `/v1/chat/completions`; defaults are OpenAI's."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`; give one of the two."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None: 1."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """None: 1."""
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = 1
    frequency_penalty: Neutral = None
    presence_penalty: Neutral = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None

    user: str | None = None
    """This and the next fields do not change the answer and are ignored."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def token_limit(self) -> int | None:
        """The limit on new tokens under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts, empty ones left out."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """What a backend answers."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class ChatBackend(Protocol):
    """What the routes need."""

    @property
    def model(self) -> str:
        """Name under which the model is served."""
        ...

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        """Answer a checked request for this model.

        Raises:
            ApiError: the request cannot be answered.
        """
        ...


class ApiError(Exception):
    """An error that the client sees in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def key_digest(api_key: str) -> str:
    """SHA-256 of an API key, so that replicas need not hold the key itself."""
    return hashlib.sha256(api_key.encode()).hexdigest()


def make_api(backend: ChatBackend, api_key_digest: str = "") -> FastAPI:
    """The routes `/health`, `/v1/models` and `/v1/chat/completions` of a backend.

    Args:
        backend: answers the chats.
        api_key_digest: `key_digest` of the key that `/v1` asks for; empty: no key.
    """
    api = FastAPI(title="step_ray agent")
    _add_error_handlers(api)

    async def authorize(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if api_key_digest and not (
            scheme.lower() == "bearer" and hmac.compare_digest(key_digest(key), api_key_digest)
        ):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key")

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models", dependencies=[Depends(authorize)])
    async def models() -> dict[str, Any]:
        model = Model(id=backend.model, created=0, object="model", owned_by="step_ray")
        return {"object": "list", "data": [model.model_dump()]}

    @api.post("/v1/chat/completions", dependencies=[Depends(authorize)])
    async def chat(body: ChatRequest) -> Response:
        _check(body, backend.model)
        answer = await backend.chat(body)
        if body.stream:
            return StreamingResponse(_events(body, answer), media_type="text/event-stream")
        return _json(_completion(body, answer))

    return api


def _check(body: ChatRequest, served: str) -> None:
    """What no single field can tell."""
    if body.model != served:
        raise ApiError(
            404,
            f"model {body.model!r} is not served; it is {served!r}",
            code="model_not_found",
            param="model",
        )
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both")
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options need stream=true", param="stream_options")


def _completion(body: ChatRequest, answer: ChatAnswer) -> ChatCompletion:
    message = ChatCompletionMessage(role="assistant", content=answer.text)
    return ChatCompletion(
        id=_new_id(),
        object="chat.completion",
        created=int(time.time()),
        model=body.model,
        choices=[Choice(index=0, message=message, finish_reason=answer.finish_reason)],
        usage=_usage(answer),
    )


def _events(body: ChatRequest, answer: ChatAnswer) -> Iterator[str]:
    """Server-sent events: the whole text in one chunk, then the finish reason."""
    chunk = ChatCompletionChunk(
        id=_new_id(),
        object="chat.completion.chunk",
        created=int(time.time()),
        model=body.model,
        choices=[],
    )
    text = ChunkChoice(index=0, delta=ChoiceDelta(role="assistant", content=answer.text))
    end = ChunkChoice(index=0, delta=ChoiceDelta(), finish_reason=answer.finish_reason)
    for choice in (text, end):
        yield _event(chunk.model_copy(update={"choices": [choice]}))
    if body.stream_options and body.stream_options.include_usage:
        yield _event(chunk.model_copy(update={"usage": _usage(answer)}))
    yield "data: [DONE]\n\n"


def _event(chunk: ChatCompletionChunk) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def _usage(answer: ChatAnswer) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=answer.cached_tokens),
    )


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def known(request: Request, exc: ApiError) -> JSONResponse:
        return JSONResponse(exc.body, status_code=exc.status, headers=exc.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        fault = _first_fault(exc)
        return JSONResponse(fault.body, status_code=fault.status)

    @api.exception_handler(HTTPException)
    async def http(request: Request, exc: HTTPException) -> JSONResponse:
        fault = ApiError(exc.status_code, str(exc.detail))
        return JSONResponse(fault.body, status_code=fault.status, headers=exc.headers)

    @api.exception_handler(Exception)
    async def unknown(request: Request, exc: Exception) -> JSONResponse:
        fault = ApiError(500, f"internal error: {type(exc).__name__}", kind="server_error")
        return JSONResponse(fault.body, status_code=fault.status)


def _first_fault(exc: RequestValidationError) -> ApiError:
    """The first fault of a body, by the name of its field."""
    fault = exc.errors()[0]
    param = ".".join(str(part) for part in fault["loc"] if part != "body")
    is_unknown = fault["type"] == "extra_forbidden"
    message = "not supported by this server" if is_unknown else fault["msg"]
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)
