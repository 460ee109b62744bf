"""A conversation with one loss flag per turn: what exports are written from and imports read into.

Takes trajectories, gives `Chat` records. It knows no file format (formats.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

from step_ray.react import conversation
from step_ray.training.masking import (
    NOTHING_TRAINED,
    OTHER_SOURCE,
    is_left_out,
    is_trained,
    steps_in_text,
    unwanted,
)
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.types import Source, Step, Trajectory

MIXED = "error and correction in one turn"
"""Why a trajectory has no per-turn flags: `teacher.when: before_execution` writes such turns."""

Mixed = Literal["drop", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """One message and its flag."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    trained: bool | None = None
    """None: the turn is not the agent's."""
    kind: str = ""
    """Value of `types.StepKind`; empty: not known, or not a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """One episode as a conversation; None and empty: not known."""

    chat_id: str
    turns: tuple[ChatTurn, ...]
    task_id: str = ""
    env: str = ""
    split: str = ""
    task_type: str = ""
    goal: str = ""
    source: Source | None = None
    success: bool | None = None
    reward: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPolicy:
    """What is exported, and with which flags."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    recipe: Recipe = field(default_factory=lambda: Recipe(policy="step"))
    """Its `match` is not applied: one trajectory does not know the others."""
    mixed: Mixed = "drop"
    """A turn that is partly trained: drop its trajectory, or split the turn in two."""


def to_chat(trajectory: Trajectory, policy: ExportPolicy) -> Chat | str:
    """The conversation of a trajectory, or why it has none.

    As in training, the last observation is left out: nobody answers it.

    Raises:
        DataError: a reflection is to be left out, but cannot be told from the rest of its step.
    """
    reason = unwanted(trajectory, policy.dataset)
    reason = reason or (OTHER_SOURCE if is_left_out(trajectory, policy.recipe) else None)
    if reason:
        return reason
    steps = steps_in_text(trajectory, policy.recipe, policy.dataset)
    turns: list[ChatTurn] = []
    for group in _messages(steps):
        agent = _agent_turns(group, policy)
        if len(agent) > 1 and policy.mixed == "drop":
            return MIXED
        turns += agent
        if group[-1].observation is not None:
            turns.append(ChatTurn(role="user", content=group[-1].observation))
    if not any(turn.trained for turn in turns):
        return NOTHING_TRAINED
    if turns[-1].role == "user":
        turns.pop()
    task = trajectory.task
    return Chat(
        chat_id=trajectory.trajectory_id,
        turns=(*_prompt(trajectory), *turns),
        task_id=task.task_id,
        env=task.env,
        split=task.split,
        task_type=task.task_type,
        goal=task.goal,
        source=trajectory.source,
        success=trajectory.success,
        reward=trajectory.reward,
    )


def _prompt(trajectory: Trajectory) -> Iterable[ChatTurn]:
    for message in trajectory.prompt:
        trained = False if message.role == "assistant" else None
        yield ChatTurn(role=message.role, content=message.content, trained=trained)


def _messages(steps: Sequence[Step]) -> Iterable[list[Step]]:
    """The steps of each assistant message: unexecuted ones share that of the step after them."""
    group: list[Step] = []
    for step in steps:
        group.append(step)
        if step.observation is not None or step is steps[-1]:
            yield group
            group = []


def _agent_turns(group: Sequence[Step], policy: ExportPolicy) -> list[ChatTurn]:
    """One turn when all steps of the message share a flag; else one for each run of equal flags."""
    turns = []
    flagged = [(is_trained(step, policy.recipe, policy.dataset), step) for step in group]
    for trained, run in groupby(flagged, key=lambda pair: pair[0]):
        steps = [step for _, step in run]
        (message,) = conversation((), [*steps[:-1], replace(steps[-1], observation=None)])
        kinds = {step.kind.value for step in steps}
        kind = kinds.pop() if len(kinds) == 1 else ""
        turns.append(
            ChatTurn(role="assistant", content=message.content, trained=trained, kind=kind)
        )
    return turns
