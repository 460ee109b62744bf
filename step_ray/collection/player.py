"""Players by rule behind the `ChatModel` interface, so that the episode loop knows only one kind.

Takes the conversation of a turn, gives the turn of a rule. It calls no model and no environment.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from step_ray.llm import Completion
from step_ray.react import format_turn, parse_turn
from step_ray.types import Message


class HistoryPlayer(ABC):
    """Plays from what the conversation says: first observation, then (action, observation)s."""

    name: str

    @abstractmethod
    def play(self, first: str, history: Sequence[tuple[str, str]], draw: str) -> tuple[str, str]:
        """Thought and action of the next turn.

        Args:
            first: the first observation.
            history: (action, observation) of the turns so far; an unreadable turn has action "".
            draw: seeds what is random; another one for each turn.
        """

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
        """The turn after the conversation so far."""
        first, *observations = [m.content for m in messages if m.role == "user"]
        turns = [parse_turn(m.content) for m in messages if m.role == "assistant"]
        actions = [turn.action if turn else "" for turn in turns]
        history = list(zip(actions, observations, strict=True))
        thought, action = self.play(first, history, f"{session_id}/{seed}")
        return Completion(text=format_turn(thought, action))

    async def aclose(self) -> None:  # noqa: B027 - none of them has anything to close
        """Nothing to close."""
