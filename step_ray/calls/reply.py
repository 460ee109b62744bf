"""What is read of a chat completion: the few fields that a call needs, checked.

Takes the JSON of an answer, gives a `Reply`. Not openai's own `ChatCompletion`: that is built
field by field in Python, and checks none of them.
"""

from typing import Annotated

from pydantic import BaseModel, Field, ValidationError


class ReplyMessage(BaseModel):
    """What the model said."""

    content: str | None = None


class ReplyChoice(BaseModel):
    """One continuation of the conversation."""

    message: ReplyMessage
    finish_reason: str | None = None


class ReplyUsage(BaseModel):
    """What the endpoint counted."""

    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)] = 0


class Reply(BaseModel):
    """An answer with status 200; other fields are not looked at."""

    choices: Annotated[list[ReplyChoice], Field(min_length=1)]
    usage: ReplyUsage | None = None

    @classmethod
    def read(cls, body: object) -> "Reply":
        """Read a body: parsed, or as text where the endpoint does not say that it is JSON.

        Raises:
            ValueError: it is no chat completion.
        """
        return cls.model_validate_json(body) if isinstance(body, str) else cls.model_validate(body)


def why_not(exc: ValueError) -> str:
    """What makes an answer no chat completion, without a word of it."""
    if not isinstance(exc, ValidationError):
        return type(exc).__name__
    fault = exc.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return f"{place}: {fault['msg']}" if place else fault["msg"]
