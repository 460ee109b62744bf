"""Teachers: who judges a step, reflects on an error and corrects it.

Takes a `StepView`, gives a `Judgement`. Two kinds behind one protocol: `LLMTeacher` asks a model
for strict JSON, `OracleTeacher` asks the environment's expert. Neither touches the environment.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from step_ray.envs import has_expert, make_expert
from step_ray.errors import ContextLengthError, DataError, LLMError, TeacherError
from step_ray.llm import ChatModel, Completion
from step_ray.player import HistoryPlayer
from step_ray.react import load_prompt
from step_ray.teacher_config import TeacherConfig
from step_ray.types import Message, Step, Task, Verdict, VerdictLabel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """All that a teacher may see of one step."""

    task: Task
    prompt: tuple[Message, ...]
    history: tuple[Step, ...]
    """Steps before the candidate."""
    candidate: Step
    """The step to judge; its observation is None when it has not been executed."""
    admissible: tuple[str, ...] = ()
    """Valid actions now, where the environment lists them and the teacher may see them."""
    reference: tuple[Step, ...] = ()
    """A golden trajectory of the same task, where configured."""
    seed: int = 0

    @property
    def first_observation(self) -> str:
        """The environment's first text."""
        return self.prompt[-1].content


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict and what it cost."""

    verdict: Verdict
    calls: int = 0
    """LLM calls, re-asks included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


class Teacher(Protocol):
    """Judges one step at a time; keeps no state between steps."""

    name: str

    async def judge(self, view: StepView) -> Judgement:
        """Judge the candidate step.

        Raises:
            TeacherError: no usable verdict.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class OracleTeacher:
    """The environment's expert as a teacher.

    ALFWorld's knows only what the agent has seen, ScienceWorld's knows a gold path.
    """

    def __init__(self, env: str) -> None:
        has_expert(env)
        self.name = f"oracle:{env}"

    async def judge(self, view: StepView) -> Judgement:
        """Judge by rule; see the environment's judge module."""
        history = executed_pairs(view.history)
        step = view.candidate
        try:
            verdict = make_expert(view.task).judge(
                view.first_observation, history, step.action, step.observation
            )
        except (ValueError, DataError) as exc:
            raise TeacherError(f"oracle on {view.task.task_id}: {exc}") from exc
        return Judgement(verdict=verdict)

    async def aclose(self) -> None:
        """Nothing to close."""


class ExpertStudent(HistoryPlayer):
    """The environment's expert as a student: it plays the golden episode of one task."""

    def __init__(self, task: Task) -> None:
        self.name = f"expert:{task.env}"
        self._expert = make_expert(task)

    def play(self, first: str, history: Sequence[tuple[str, str]], draw: str) -> tuple[str, str]:
        """The expert's turn; there is nothing random in it."""
        return self._expert.propose(first, history)


def executed_pairs(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """(action, observation) of the steps that were executed."""
    return [(s.action, s.observation) for s in steps if s.observation is not None]


class TeacherReply(BaseModel):
    """The JSON that an LLM teacher must answer with."""

    model_config = ConfigDict(extra="ignore")

    verdict: Literal["good", "suboptimal", "error"]
    reflection: str = ""
    thought: str = ""
    action: str = ""


TEXT_FIELDS = ("reflection", "thought", "action")
REPLY_SCHEMA: dict[str, Any] = {
    "name": "verdict",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "verdict": {"type": "string", "enum": ["good", "suboptimal", "error"]},
            **{name: {"type": "string"} for name in TEXT_FIELDS},
        },
        "required": ["verdict", *TEXT_FIELDS],
        "additionalProperties": False,
    },
}
"""Written out: pydantic's schema of `TeacherReply` has defaults, which strict mode refuses."""


class LLMTeacher:
    """A language model as a teacher: strict JSON, asked again when unusable."""

    def __init__(self, model: ChatModel, config: TeacherConfig) -> None:
        self.name = model.name
        self._model = model
        self._config = config

    async def judge(self, view: StepView) -> Judgement:
        """Ask the model; a reply that is no usable verdict is shown to it and asked for again."""
        messages = teacher_messages(view, self._config.prompt)
        cost = Judgement(verdict=Verdict(label=VerdictLabel.GOOD))
        fault = ""
        for _ in range(self._config.max_reasks + 1):
            completion = await self._ask(messages, view)
            cost = _add_cost(cost, completion)
            reply, fault = parse_reply(completion.text, view)
            if reply is not None:
                return replace(cost, verdict=reply)
            messages = [
                *messages,
                Message(role="assistant", content=completion.text),
                Message(role="user", content=f"That cannot be used: {fault} Answer again in JSON."),
            ]
        raise TeacherError(f"{self.name}: no usable verdict after {cost.calls} calls: {fault}")

    async def _ask(self, messages: Sequence[Message], view: StepView) -> Completion:
        config = self._config
        try:
            async with asyncio.timeout(config.timeout_s):
                return await self._model.complete(
                    messages,
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    seed=view.seed,
                    json_schema=REPLY_SCHEMA,
                )
        except TimeoutError as exc:
            raise TeacherError(f"{self.name}: no answer within {config.timeout_s:g} s") from exc
        except ContextLengthError as exc:
            raise TeacherError(f"{self.name}: the episode does not fit its context") from exc
        except LLMError as exc:
            raise TeacherError(str(exc)) from exc

    async def aclose(self) -> None:
        """Close the model's connections."""
        await self._model.aclose()


def _add_cost(cost: Judgement, completion: Completion) -> Judgement:
    return replace(
        cost,
        calls=cost.calls + 1,
        prompt_tokens=cost.prompt_tokens + completion.prompt_tokens,
        completion_tokens=cost.completion_tokens + completion.completion_tokens,
        retries=cost.retries + completion.retries,
    )


def teacher_messages(view: StepView, prompt_version: str) -> list[Message]:
    """The conversation that asks an LLM teacher for its verdict on one step."""
    parts = [f"Task and first observation:\n{view.first_observation}", "History:"]
    parts += [_step_text(step) for step in view.history] or ["(none yet)"]
    parts += ["Latest step, to be judged:", _step_text(view.candidate)]
    if view.admissible:
        parts.append("Valid actions now: " + ", ".join(view.admissible))
    if view.reference:
        golden = "; ".join(step.action for step in view.reference)
        parts.append(f"A known good way to do the task (do not mention it): {golden}")
    return [
        Message(role="system", content=load_prompt(prompt_version)),
        Message(role="user", content="\n\n".join(parts)),
    ]


def _step_text(step: Step) -> str:
    observation = step.observation if step.observation is not None else "(not executed)"
    return f"{step.text}\nObservation: {observation}"


def parse_reply(text: str, view: StepView) -> tuple[Verdict | None, str]:
    """Read a teacher's JSON; (None, what is wrong with it) when it is no usable verdict."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return None, "there is no JSON object in it."
    try:
        reply = TeacherReply.model_validate(json.loads(text[start : end + 1]))
    except json.JSONDecodeError as exc:
        return None, f"the JSON is broken ({exc.msg})."
    except ValidationError as exc:
        first = exc.errors()[0]
        return None, f"the field {'.'.join(map(str, first['loc']))!r} is wrong: {first['msg']}."
    return _checked(reply, view)


def _checked(reply: TeacherReply, view: StepView) -> tuple[Verdict | None, str]:
    label = VerdictLabel(reply.verdict)
    if label is VerdictLabel.GOOD:
        return Verdict(label=label), ""
    fields = {name: " ".join(getattr(reply, name).split()) for name in TEXT_FIELDS}
    action = fields["action"].removeprefix("Action:").strip()
    if not action:
        return None, "a faulty step needs an action that corrects it."
    if view.admissible and action not in view.admissible:
        return None, f"{action!r} is not one of the valid actions."
    return Verdict(label=label, **{**fields, "action": action}), ""
