"""What the episode loop needs from a text environment, and nothing more.

An environment is synchronous and single-threaded: the episode loop calls one object from one
thread. It never talks to an LLM and knows nothing of prompts, teachers or masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from step_ray.types import Task, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvStep:
    """The environment's answer to one action."""

    observation: str
    reward: float
    """Reward of this step; the episode's reward is the sum."""
    done: bool
    success: bool
    """The task is solved (by the environment's own rule)."""
    noop: bool = False
    """The environment did not understand the action or could not carry it out."""


@runtime_checkable
class TextEnv(Protocol):
    """A text environment; errors come out as `EnvError`."""

    engine: str
    """Engine name and version, recorded with every trajectory."""

    def reset(self, task: Task) -> str:
        """Load the task and return the first observation, goal included."""
        ...

    def step(self, action: str) -> EnvStep:
        """Carry out one action."""
        ...

    def admissible_actions(self) -> list[str]:
        """Actions that would be understood now; empty where the environment cannot list them."""
        ...

    def close(self) -> None:
        """Free what the environment holds; the object is not used afterwards."""
        ...


class Expert(Protocol):
    """An expert that knows only what the agent has read; a module with these functions will do.

    `history` is the executed (action, observation) pairs after the first observation.
    """

    def propose(
        self, first_observation: str, history: Sequence[tuple[str, str]]
    ) -> tuple[str, str]:
        """The next (thought, action)."""
        ...

    def judge(
        self,
        first_observation: str,
        history: Sequence[tuple[str, str]],
        action: str,
        observation: str | None,
    ) -> Verdict:
        """Judge an action; `observation` is None when it has not been executed."""
        ...
