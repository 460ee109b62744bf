"""What the routes need from below: a model that answers, an agent that acts.

Interfaces and plain records only; agent_server.py implements them over a batch, tests by a script.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from step_ray.llm import Completion
from step_ray.serving.api.agent_schemas import ActRequest, EpisodesRequest
from step_ray.serving.api.schemas import ChatRequest, CompletionRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one prompt."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """The new tokens, the one that ends the turn included."""

    def to_completion(self) -> Completion:
        """As a player of episodes has it (`llm.ChatModel`)."""
        return Completion(
            text=self.text,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            finish_reason=self.finish_reason,
        )


class Awaited(Protocol):
    """A prompt that was taken in and is answered as a whole."""

    async def answer(self) -> Answer:
        """The whole answer.

        Raises:
            TimeoutError: it took longer than a request may.
        """
        ...

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        ...


class Answering(Awaited, Protocol):
    """A prompt that was taken in and is being answered."""

    def pieces(self) -> AsyncIterator[str]:
        """The text as it comes; asked for at most once, and before `answer`."""
        ...


class AgentBackend(Protocol):
    """The agent, apart from the model that it is."""

    @property
    def model(self) -> str:
        """Name under which the model is served."""
        ...

    async def act(self, request: ActRequest) -> Awaited:
        """Take in a request for the agent's next step.

        Raises:
            ApiError: the request cannot be answered.
            StepRayError: the messages cannot be rendered, or do not fit.
        """
        ...

    async def episodes(self, request: EpisodesRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Episodes as they end, then a report.

        Raises:
            ApiError: they cannot be played, or there is no room for them.
        """
        ...

    async def metrics(self) -> bytes:
        """Counts in Prometheus' text format."""
        ...


class Backend(AgentBackend, Protocol):
    """One model and the agent that it is."""

    async def chat(self, request: ChatRequest) -> Answering:
        """Take in a checked request for this model; see `act`."""
        ...

    async def complete(self, request: CompletionRequest) -> Sequence[Answering]:
        """Take in one prompt per choice, all or none; see `act`."""
        ...
