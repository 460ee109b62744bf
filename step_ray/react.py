"""ReAct text: "Thought: ... / Action: ..." <-> fields, and the messages of a turn.

The one place that knows how a turn looks. The same functions build the prompt of a rollout, of
an evaluation and of a training example, so the three cannot drift apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from step_ray.errors import ConfigError, DataError
from step_ray.types import Message, Step, Trajectory

_TURN = re.compile(
    r"\A\s*(?:Thought:[ \t]*(?P<thought>.*?)\s*\n\s*)?Action:[ \t]*(?P<action>[^\n]+?)\s*\Z", re.S
)

_SECOND_ACTION = re.compile(r"\n\s*Action:")
_NEXT_THOUGHT = re.compile(r"\n(?=Thought:)")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A parsed assistant message."""

    thought: str
    action: str

    @property
    def text(self) -> str:
        """The turn in its normal form."""
        return format_turn(self.thought, self.action)


def format_turn(thought: str, action: str) -> str:
    """The assistant message for a thought (may be empty) and an action."""
    return f"Thought: {thought}\nAction: {action}" if thought else f"Action: {action}"


def parse_turn(text: str) -> Turn | None:
    """Read an assistant message; None when it is not one thought and one action.

    The thought may span lines and may be missing; the action is one line, at the end. Text after
    the action, or a second action, is refused rather than guessed at.
    """
    match = _TURN.match(text)
    if match is None or _SECOND_ACTION.search(match["thought"] or ""):
        return None
    action = match["action"].strip()
    return Turn(thought=(match["thought"] or "").strip(), action=action) if action else None


def parse_turns(text: str) -> list[Turn] | None:
    """Read an assistant message that may mend itself: several thought-action pairs in a row.

    Only the last pair is meant to be executed (`teacher.when: before_execution` trains this form).
    None when any part is unreadable.
    """
    parts = [part for part in _NEXT_THOUGHT.split(text.strip()) if part.strip()]
    turns = [parse_turn(part) for part in parts]
    return None if not turns or None in turns else [turn for turn in turns if turn]


def format_correction(reflection: str, thought: str, action: str) -> str:
    """The correction turn: `Thought: <reflection> <thought>` / `Action: <action>`."""
    return format_turn(" ".join(part for part in (reflection, thought) if part), action)


def without_reflection(step: Step) -> Step:
    """A correction as it would stand without its reflection; any other step as it is.

    Raises:
        DataError: the step's text does not begin with its reflection, so it cannot be taken out.
    """
    if not step.reflection:
        return step
    if step.text != format_turn(step.thought, step.action) or not step.thought.startswith(
        step.reflection
    ):
        raise DataError(
            f"step {step.index}: its text does not begin with its reflection"
            f" {step.reflection[:40]!r}; keep `reflection: true` for this data"
        )
    thought = step.thought.removeprefix(step.reflection).removeprefix(" ")
    text = format_turn(thought, step.action)
    return replace(step, text=text, thought=thought, reflection=None)


@cache
def load_prompt(version: str) -> str:
    """The instruction text `prompts/<version>.txt`.

    Raises:
        ConfigError: no such prompt version.
    """
    folder = resources.files("step_ray") / "prompts"
    file = folder / f"{version}.txt"
    if not file.is_file():
        known = sorted(
            p.name.removesuffix(".txt") for p in folder.iterdir() if p.name[-4:] == ".txt"
        )
        raise ConfigError(f"prompt: {version!r} is not a known prompt version; use one of {known}")
    return file.read_text(encoding="utf-8").strip()


def initial_messages(prompt_version: str, observation: str) -> tuple[Message, ...]:
    """What stands before the first step: the instruction and the first observation."""
    return (
        Message(role="system", content=load_prompt(prompt_version)),
        Message(role="user", content=observation),
    )


def conversation(prompt: Sequence[Message], steps: Sequence[Step]) -> list[Message]:
    """The whole episode as chat messages.

    An executed step is an assistant message followed by its observation as a user message. A step
    that was never executed (observation None, error judged before execution) shares the assistant
    message of the step after it, joined by a newline.
    """
    messages = list(prompt)
    pending = ""
    for step in steps:
        text = pending + step.text
        if step.observation is None and step is not steps[-1]:
            pending = text + "\n"
            continue
        pending = ""
        messages.append(Message(role="assistant", content=text))
        if step.observation is not None:
            messages.append(Message(role="user", content=step.observation))
    return messages


def trajectory_messages(trajectory: Trajectory) -> list[Message]:
    """`conversation` of a trajectory without the last observation, which nobody answers."""
    messages = conversation(trajectory.prompt, trajectory.steps)
    if trajectory.steps and messages[-1].role == "user":
        messages.pop()
    return messages


def split_thought(thought: str) -> tuple[str, str]:
    """Reflection and thought of a turn's thought.

    The text has no border between the two. By the form of a correction (`format_correction`) the
    last sentence leads to the action, and what stands before it says what went wrong; a thought of
    one sentence has no reflection.
    """
    parts = _SENTENCE_END.split(thought.strip())
    return " ".join(parts[:-1]), parts[-1]


def read_step(text: str, *, before_execution: bool) -> dict[str, Any]:
    """What an answer of the agent says, as the episode loop reads it.

    Args:
        text: the answer.
        before_execution: it may give up actions before its last one (`parse_turns`).

    Returns:
        `text` in its normal form, `action` (empty: unreadable), `thought`, `reflection` (empty:
        none, see `split_thought`), and the actions `given_up` before.
    """
    one = parse_turn(text)
    turns = (parse_turns(text) if before_execution else one and [one]) or []
    if not turns:
        return {"text": text.strip(), "action": "", "thought": "", "reflection": "", "given_up": []}
    reflection, thought = split_thought(turns[-1].thought)
    return {
        "text": "\n".join(turn.text for turn in turns),
        "action": turns[-1].action,
        "thought": thought,
        "reflection": reflection,
        "given_up": [turn.action for turn in turns[:-1]],
    }
