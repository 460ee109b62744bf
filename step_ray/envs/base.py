"""What the episode loop needs from a text environment, and nothing more.

An environment is synchronous and single-threaded: the episode loop calls one object from one
thread. It never talks to an LLM and knows nothing of prompts, teachers or masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from step_ray.config import RunConfig
from step_ray.types import Task, Verdict

Row: TypeAlias = dict[str, Any]
RowMapper: TypeAlias = Callable[
    [type[Callable[[Row], Row]], Mapping[str, Any], Sequence[Row]], Iterator[Row]
]
"""Runs a class over rows in parallel: (class, arguments of its constructor, rows) -> rows."""


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
        """Actions that would be understood now; empty where the environment cannot list them.

        A word in `<...>` stands for any words: `search[<keywords>]`.
        """
        ...

    def close(self) -> None:
        """Free what the environment holds; the object is not used afterwards."""
        ...


class TaskSource(Protocol):
    """Where an environment's tasks come from; a module with these functions will do."""

    def check(self, config: RunConfig) -> None:
        """Refuse what can be seen to be missing, before any work."""
        ...

    def prepare(self, config: RunConfig) -> None:
        """Make what the lists are read from, once per run."""
        ...

    def training_tasks(self, config: RunConfig) -> list[Task]:
        """All tasks that may be trained on, by id."""
        ...

    def held_out_tasks(self, config: RunConfig, split: str) -> list[Task]:
        """All tasks of a split that may be evaluated on, by id."""
        ...

    def fingerprints(self, tasks: Sequence[Task]) -> list[str]:
        """Equal for tasks of equal content, whatever their ids."""
        ...

    def equip(self, config: RunConfig, tasks: Sequence[Task], mapper: RowMapper) -> list[Task]:
        """The tasks with what the expert has to know in their params, made where it is missing."""
        ...


class Expert(Protocol):
    """An expert of one task.

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
