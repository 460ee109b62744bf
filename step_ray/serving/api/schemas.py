"""Bodies of the OpenAI routes: what is asked, checked field by field.

A field that would change the answer and is not supported is refused, never ignored.
"""

from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from step_ray.types import Message

Neutral = Annotated[float | None, Field(ge=0, le=0)]
"""A penalty that is accepted at zero only."""
Seed = Annotated[int | None, Field(ge=-(2**63), lt=2**63)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
MAX_PROMPTS = 128
"""Prompts of one request."""
DEFAULT_TOKENS = 16
"""New tokens of a completion that asks for no number; OpenAI's."""
MAX_STOPS = 16
"""Stop texts of one request; OpenAI takes 4."""


class Body(BaseModel):
    """Base of request bodies: unknown fields and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def to_message(self) -> Message:
        """The message with its parts joined."""
        if isinstance(self.content, str):
            return Message(role=self.role, content=self.content)
        return Message(role=self.role, content="".join(part.text for part in self.content))


class StreamOptions(Body):
    """What a stream carries besides the text."""

    include_usage: bool = False


class TextFormat(Body):
    """The only response format there is."""

    type: Literal["text"]


class Sampling(Body):
    """What both routes take; defaults are OpenAI's."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None: 1."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """None: 1."""
    seed: Seed = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = 1
    frequency_penalty: Neutral = None
    presence_penalty: Neutral = None
    repetition_penalty: Annotated[float | None, Field(ge=1, le=1)] = None
    """vLLM's, accepted at one only: its load tool sends it."""
    ignore_eos: bool | None = None
    """vLLM's: write `max_tokens` tokens, whatever they say; for load tools."""

    user: str | None = None
    """This and the next fields do not change the answer and are ignored."""
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts, empty ones left out."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @property
    def has_usage_event(self) -> bool:
        """The stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    """Body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`; give one of the two."""
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None

    @property
    def token_limit(self) -> int | None:
        """The limit on new tokens under either name; None: what fits the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampling):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    """One prompt or several, as text or as token ids; each has a choice of its own."""
    max_tokens: int | None = Field(default=None, ge=1)
    """None: `DEFAULT_TOKENS`, or fewer where they do not fit."""
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per choice; an empty list is one empty prompt."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [cast(str | list[int], self.prompt)]
        return cast(list[str | list[int]], self.prompt)
