"""One rollout actor: plays the episodes of manifest rows, many at once on one event loop.

Takes an `EpisodePlan` (what an actor needs, nothing that does not pickle) and rows, gives rows with
the trajectory as JSON. It writes no files and knows nothing of Ray Data's plan (collect.py).
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from step_ray.config import CollectConfig, RunConfig
from step_ray.envs import make_env
from step_ray.errors import BudgetError, ConfigError
from step_ray.llm import ChatModel, OpenAIChat
from step_ray.rollout import EpisodeSettings, run_episode, trajectory_id
from step_ray.store import to_row
from step_ray.tasks import TASK_SCHEMA, task_from_row
from step_ray.teacher import ExpertStudent, Judgement, LLMTeacher, OracleTeacher, StepView, Teacher
from step_ray.teacher_config import TeacherConfig
from step_ray.types import Source, Step, StopReason, Task, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a model answers."""

    base_url: str
    model: str
    api_key_env: str = ""

    def connect(self, *, timeout_s: float, max_concurrency: int) -> OpenAIChat:
        """A client; made on the actor, so that the key is read there and never travels.

        Raises:
            ConfigError: the key's variable is not set on the actor.
        """
        key = os.environ.get(self.api_key_env) if self.api_key_env else "none"
        if not key:
            raise ConfigError(
                f"api_key_env: {self.api_key_env!r} is not set on {os.uname().nodename}"
            )
        return OpenAIChat(
            base_url=self.base_url,
            model=self.model,
            api_key=key,
            timeout_s=timeout_s,
            max_concurrency=max_concurrency,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodePlan:
    """How to play: everything an actor needs, nothing that does not pickle."""

    source: Source
    settings: EpisodeSettings
    env: str
    env_options: Mapping[str, Any] = field(default_factory=dict)
    student: Address | None = None
    """None: the environment's expert plays."""
    teacher: TeacherConfig | None = None
    references: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    """Task id -> golden steps, for `teacher.reference`."""
    num_actors: int = 1
    episodes_per_actor: int = 32
    cpus_per_actor: float = 0.5
    rows_per_shard: int = 16
    max_error_share: float = 0.0
    """Share of the episodes that may end by a fault of the machinery."""

    @property
    def uses_expert(self) -> bool:
        """The environment's expert plays or teaches."""
        return self.student is None or (self.teacher is not None and self.teacher.kind == "oracle")

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        source: Source,
        *,
        student: Address | None,
        teacher: TeacherConfig | None = None,
        temperature: float = 0.0,
        episodes_per_actor: int | None = None,
        references: Mapping[str, tuple[Step, ...]] | None = None,
    ) -> "EpisodePlan":
        """The plan of one stage of a run."""
        collect: CollectConfig = config.collect
        one_at_a_time = config.env.engine == "textworld"  # its engine is global to the process
        return cls(
            source=source,
            settings=_episode_settings(config, temperature),
            env=config.env.name,
            env_options=config.env.options(),
            student=student,
            teacher=teacher,
            references=references or {},
            num_actors=collect.num_actors,
            episodes_per_actor=1
            if one_at_a_time
            else episodes_per_actor or collect.episodes_per_actor,
            cpus_per_actor=collect.cpus_per_actor,
            rows_per_shard=collect.rows_per_shard,
            max_error_share=collect.max_error_share,
        )


def _episode_settings(config: RunConfig, temperature: float) -> EpisodeSettings:
    """The limits of a run; collection and evaluation differ in the temperature only."""
    env, collect, teacher = config.env, config.collect, config.teacher
    return EpisodeSettings(
        prompt=env.prompt,
        max_steps=env.max_steps,
        max_steps_by_type=env.max_steps_by_type,
        max_new_tokens=collect.max_new_tokens,
        temperature=temperature,
        max_format_errors=collect.max_format_errors,
        max_corrections=teacher.max_corrections,
        before_execution=teacher.when == "before_execution",
        reflection=teacher.reflection,
        show_admissible=teacher.show_admissible,
        step_timeout_s=collect.step_timeout_s,
        episode_timeout_s=collect.episode_timeout_s,
    )


class BudgetedTeacher:
    """A teacher that asks the shared budget before every judgement."""

    def __init__(self, teacher: Teacher, take: Callable[[], Awaitable[bool]], limit: int) -> None:
        self.name = teacher.name
        self._teacher, self._take, self._limit = teacher, take, limit

    async def judge(self, view: StepView) -> Judgement:
        """Judge within the budget.

        Raises:
            BudgetError: it is spent; the episode ends as `budget`.
        """
        if not await self._take():
            raise BudgetError(f"teacher.max_calls: {self._limit} calls are spent")
        return await self._teacher.judge(view)

    async def aclose(self) -> None:
        """Close the teacher."""
        await self._teacher.aclose()


class EpisodeRunner:
    """The Ray Data actor: plays many episodes at once on one event loop.

    Environment calls go to one thread per actor; LLM calls are awaited meanwhile. `__call__` never
    raises: what goes wrong comes back as a row.
    """

    def __init__(self, plan: EpisodePlan, budget: Any = None) -> None:
        self._plan = plan
        self._budget = budget
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="env")
        self._student: ChatModel | None = None
        self._teacher: Teacher | None = None

    def _open(self, task: Task) -> ChatModel:
        """Who plays the task; clients are made inside the event loop that uses them."""
        plan = self._plan
        if self._teacher is None:
            # the teacher first: if it cannot be made, no episode may be played without it
            self._teacher = self._make_teacher()
        if plan.student is None:
            return ExpertStudent(task)
        if self._student is None:
            self._student = plan.student.connect(
                timeout_s=plan.settings.step_timeout_s,
                max_concurrency=plan.episodes_per_actor,
            )
        return self._student

    def _make_teacher(self) -> Teacher | None:
        config = self._plan.teacher
        if config is None:
            return None
        teacher: Teacher = make_teacher(config, self._plan.env)
        if self._budget is None or config.max_calls is None:
            return teacher

        async def take() -> bool:
            return bool(await self._budget.take.remote())

        return BudgetedTeacher(teacher, take, config.max_calls)

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Play the episode of one manifest row; gives its id, its stop reason and its record."""
        seed = int(row["seed"])
        task = task_from_row({name: row[name] for name in TASK_SCHEMA.names})
        try:
            trajectory = await self._play(task, seed)
        except Exception as exc:
            # a raised error would drop the sibling episodes of this actor, so it becomes a row
            line = (str(exc).splitlines() or [""])[0]
            trajectory = _failed(task, self._plan, seed, f"{type(exc).__name__}: {line}")
        return {
            "trajectory_id": trajectory.trajectory_id,
            "record": json.dumps(to_row(trajectory), ensure_ascii=False),
        }

    async def _play(self, task: Task, seed: int) -> Trajectory:
        plan = self._plan
        student = self._open(task)
        env = make_env(plan.env, **plan.env_options)
        try:
            return await run_episode(
                task,
                env,
                student,
                settings=plan.settings,
                source=plan.source,
                teacher=self._teacher,
                seed=seed,
                reference=plan.references.get(task.task_id, ()),
                executor=self._executor,
            )
        finally:
            await asyncio.get_running_loop().run_in_executor(self._executor, env.close)


def make_teacher(config: TeacherConfig, env: str) -> Teacher:
    """The teacher that the configuration names."""
    if config.kind == "oracle":
        return OracleTeacher(env)
    endpoint = Address(base_url=config.base_url, model=config.model, api_key_env=config.api_key_env)
    model = endpoint.connect(timeout_s=config.timeout_s, max_concurrency=config.max_concurrency)
    return LLMTeacher(model, config)


def _failed(task: Task, plan: EpisodePlan, seed: int, error: str) -> Trajectory:
    return Trajectory(
        trajectory_id=trajectory_id(task.task_id, plan.source, seed),
        task=task,
        prompt=(),
        steps=(),
        reward=0.0,
        success=False,
        stop_reason=StopReason.ENV_ERROR,
        source=plan.source,
        seed=seed,
        error=error,
        prompt_version=plan.settings.prompt,
    )
