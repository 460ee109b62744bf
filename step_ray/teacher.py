"""Teachers: who judges a step, reflects on an error and corrects it.

Takes a `StepView`, gives a `Verdict`. Two kinds behind one protocol: `LLMTeacher` asks a model for
strict JSON, `OracleTeacher` asks the environment's expert. Neither touches the environment; how a
question and a reply look is judging.py's.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from step_ray.calls.cache import CallCache, call_key
from step_ray.calls.gate import Gate, OpenGate
from step_ray.calls.spending import Spending
from step_ray.collection.judging import REPLY_SCHEMA, StepView, read_reply, reask, teacher_messages
from step_ray.collection.player import HistoryPlayer
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.envs import has_expert, make_expert
from step_ray.errors import ContextLengthError, DataError, LLMError, TeacherError
from step_ray.llm import ChatModel, Completion
from step_ray.types import Message, Step, Task, Verdict


class Teacher(Protocol):
    """Judges one step at a time; keeps no state between steps."""

    name: str

    async def judge(self, view: StepView) -> Verdict:
        """Judge the candidate step; what it costs goes to `view.meter` at once.

        Raises:
            TeacherError: no usable verdict.
            BudgetError: nothing left to spend.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


class OracleTeacher:
    """The environment's expert as a teacher.

    ALFWorld's knows only what the agent has seen, ScienceWorld's knows a gold path. A judgement
    counts as a call, for budgets too.
    """

    def __init__(self, env: str, gate: Gate | None = None) -> None:
        has_expert(env)
        self.name = f"oracle:{env}"
        self._gate = gate or OpenGate()

    async def judge(self, view: StepView) -> Verdict:
        """Judge by rule; see the environment's judge module."""
        one = Spending(calls=1)
        await self._gate.enter(one)
        self._gate.leave(one, one)
        view.meter.teacher(Completion(text=""))
        history = executed_pairs(view.history)
        step = view.candidate
        try:
            return make_expert(view.task).judge(
                view.first_observation, history, step.action, step.observation
            )
        except (ValueError, DataError) as exc:
            raise TeacherError(f"oracle on {view.task.task_id}: {exc}") from exc

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


class LLMTeacher:
    """A language model as a teacher: strict JSON, asked again when unusable.

    A reply is stored once its judgement has led to a verdict: what a rerun may take for granted.
    """

    def __init__(
        self, model: ChatModel, config: TeacherConfig, cache: CallCache | None = None
    ) -> None:
        self.name = model.name
        self._model = model
        self._config = config
        self._cache = cache

    async def judge(self, view: StepView) -> Verdict:
        """Ask the model; a reply that is no usable verdict is shown to it and asked for again."""
        config = self._config
        messages = teacher_messages(view, config.prompt)
        fresh: dict[str, Completion] = {}
        fault = ""
        for _ in range(config.max_reasks + 1):
            key = self._key(messages, view)
            completion = await self._reply(key, messages, view)
            if not completion.cached:
                fresh[key] = completion
            verdict, fault = read_reply(completion, view, config.max_tokens)
            if verdict is not None:
                await self._remember(fresh, view)
                return verdict
            messages = [*messages, *reask(completion, fault)]
        asked = config.max_reasks + 1
        raise TeacherError(f"{self.name}: no usable verdict after {asked} calls: {fault}")

    def _key(self, messages: Sequence[Message], view: StepView) -> str:
        config = self._config
        return call_key(
            self.name,
            config.prompt,
            messages,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=view.seed,
            json_schema=REPLY_SCHEMA,
            # where it is empty the key is that of entries from before there was such a field
            **({"extra_body": config.extra_body} if config.extra_body else {}),
        )

    async def _reply(self, key: str, messages: Sequence[Message], view: StepView) -> Completion:
        """The stored reply if there is one, else the model's; charged as soon as it is there."""
        completion = await self._recall(key, view) if self._cache else None
        completion = completion or await self._ask(messages, view)
        view.meter.teacher(completion)
        return completion

    async def _recall(self, key: str, view: StepView) -> Completion | None:
        assert self._cache is not None
        found = await asyncio.to_thread(self._cache.get, key)
        if found.is_broken:
            view.meter.cache_fault()
        return found.reply

    async def _remember(self, fresh: Mapping[str, Completion], view: StepView) -> None:
        for key, completion in fresh.items() if self._cache else ():
            assert self._cache is not None
            if not await asyncio.to_thread(self._cache.put, key, completion):
                view.meter.cache_fault()

    async def _ask(self, messages: Sequence[Message], view: StepView) -> Completion:
        config = self._config
        try:
            return await self._model.complete(
                messages,
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=view.seed,
                session_id=f"{view.task.task_id}#{view.seed}",
                json_schema=REPLY_SCHEMA,
            )
        except ContextLengthError as exc:
            raise TeacherError(f"{self.name}: the episode does not fit its context") from exc
        except LLMError as exc:
            raise TeacherError(str(exc)) from exc

    async def aclose(self) -> None:
        """Close the model's connections."""
        await self._model.aclose()
