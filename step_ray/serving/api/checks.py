"""Checks of requests that no single field can make."""

from collections.abc import Sequence

from step_ray.serving.api.errors import ApiError, shown_name
from step_ray.serving.api.schemas import (
    MAX_PROMPTS,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Sampling,
)


def check_model(wanted: str | None, served: str) -> None:
    """The model asked for (None: whichever) is the one that is served.

    Raises:
        ApiError: 404, it is not.
    """
    if wanted not in (None, served):
        raise ApiError(
            404,
            f"model {shown_name(wanted or '')} is not served; it is {served!r}",
            code="model_not_found",
            param="model",
        )


def check_sampling(body: Sampling, served: str) -> None:
    """What both OpenAI routes ask of a body.

    Raises:
        ApiError: an unknown model, or fields that do not go together.
    """
    check_model(body.model, served)
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options need stream=true", param="stream_options")


def check_chat(body: ChatRequest, served: str) -> None:
    """What a chat asks besides.

    Raises:
        ApiError: see `check_sampling`; or roles out of order.
    """
    check_sampling(body, served)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "give max_tokens or max_completion_tokens, not both")
    check_roles(body.messages)


def check_completion(body: CompletionRequest, served: str) -> None:
    """What a completion asks besides.

    Raises:
        ApiError: see `check_sampling`; or too many prompts.
    """
    check_sampling(body, served)
    if len(body.prompts) > MAX_PROMPTS:
        raise ApiError(
            400,
            f"prompt: {len(body.prompts)} of them, at most {MAX_PROMPTS} at once",
            param="prompt",
        )


def check_roles(messages: Sequence[ChatMessage]) -> None:
    """One system message at most, at the start; then user and assistant in turn, user at the ends.

    Episodes have this form, and so have the chats that the model was trained on; a template would
    render another one to text that it has never seen, or drop a part of it.

    Raises:
        ApiError: 400, with the first message that is out of order.
    """
    first = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[first:], start=first):
        wanted = "assistant" if (index - first) % 2 else "user"
        if message.role != wanted:
            raise ApiError(
                400,
                f"messages.{index}.role: {wanted!r} has its turn here, not {message.role!r}; roles"
                " are system (at the start, if at all), then user and assistant in turn",
                param=f"messages.{index}.role",
            )
    if messages[-1].role != "user":
        raise ApiError(400, "messages: the last one must be the user's", param="messages")
