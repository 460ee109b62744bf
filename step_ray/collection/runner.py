"""One rollout actor: plays the episodes of manifest rows, many at once on one event loop.

Takes an `EpisodePlan` (what an actor needs, nothing that does not pickle) and rows, gives rows with
the trajectory as JSON. It writes no files and knows nothing of Ray Data's plan (collect.py).
"""

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from step_ray.calls.cache import CallCache
from step_ray.calls.desk import Start
from step_ray.calls.endpoint import NO_KEY
from step_ray.calls.gate import Answer, Ask, DeskGate, Gate, Settled, TabGate
from step_ray.cluster.logs import quiet_clients
from step_ray.collection.teacher_config import TEACHER_ADDRESS, Price, TeacherConfig
from step_ray.config import CollectConfig, RunConfig, expand_path
from step_ray.envs import make_env
from step_ray.errors import ConfigError
from step_ray.llm import ChatModel, OpenAIChat
from step_ray.rollout import EpisodeSettings, run_episode, trajectory_id
from step_ray.storage.places import place_of
from step_ray.storage.records import to_row
from step_ray.tasks import TASK_SCHEMA, task_from_row
from step_ray.teacher import ExpertStudent, LLMTeacher, OracleTeacher, Teacher
from step_ray.types import Source, Step, StopReason, Task, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a model answers."""

    base_url: str
    model: str
    api_key_env: str = ""
    """Environment variable with the key; empty: none is sent."""
    has_many_keys: bool = False
    """The variable may hold several keys with commas between them (`serve.api_key_env`), of which
    clients send the first."""

    def connect(self, **options: Any) -> OpenAIChat:
        """A client; made on the actor, so that the key is read there and never travels.

        Args:
            options: what else `OpenAIChat` takes.

        Raises:
            ConfigError: the key's variable is not set on the actor.
        """
        return OpenAIChat(
            base_url=self.base_url,
            model=self.model,
            api_key=self.key(),
            **options,
        )

    def key(self) -> str:
        """The key to send.

        Raises:
            ConfigError: its variable is not set here.
        """
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else NO_KEY
        if self.has_many_keys:
            key = next(filter(None, map(str.strip, key.split(","))), "")
        if not key:
            raise ConfigError(
                f"api_key_env: {self.api_key_env!r} is not set on {os.uname().nodename}"
            )
        return key


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
    min_actors: int = 1
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Where actors may run, see `CollectConfig.node_labels`."""
    episodes_per_actor: int = 32
    cpus_per_actor: float = 0.5
    rows_per_shard: int = 16
    max_error_share: float = 0.0
    """Share of the episodes that may end by a fault of the machinery."""
    max_errors: int | None = None
    errors_judged_after: int = 20
    retry_errors: bool = False
    max_starts: int = 5
    try_timeout_s: float = 120.0
    """These five: see `CollectConfig`."""
    run: str = ""
    """Name of the run, for logs."""
    job_seed: int = 0
    """Seed of the run; part of the identity, because generated tasks follow from it."""
    prices: Mapping[str, Price] = field(default_factory=dict)
    """Model -> its price."""
    cache_dir: str | None = None
    """Place of the teacher's replies, the same on every node; None: none are kept."""

    @property
    def uses_expert(self) -> bool:
        """The environment's expert plays or teaches."""
        return self.student is None or (self.teacher is not None and self.teacher.kind == "oracle")

    def identity(self) -> dict[str, Any]:
        """What makes episodes those of one collection, however fast and wherever they are played.

        Plain JSON. Addresses, limits of time and the budget are no part of it.
        """
        settings = asdict(self.settings)
        for name in ("step_timeout_s", "episode_timeout_s"):
            settings.pop(name)
        teacher = self.teacher and self.teacher.model_dump(mode="json", exclude=TEACHER_ADDRESS)
        if teacher:
            teacher.pop("budget")
        return {
            "source": self.source.value,
            "env": self.env,
            "env_options": dict(self.env_options),
            "settings": settings,
            "student": self.student.model if self.student else "expert",
            "teacher": teacher,
            "seed": self.job_seed,
        }

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
            min_actors=collect.min_actors,
            node_labels=collect.node_labels,
            episodes_per_actor=1
            if one_at_a_time
            else episodes_per_actor or collect.episodes_per_actor,
            cpus_per_actor=collect.cpus_per_actor,
            rows_per_shard=collect.rows_per_shard,
            max_error_share=collect.max_error_share,
            max_errors=collect.max_errors,
            errors_judged_after=collect.errors_judged_after,
            retry_errors=collect.retry_errors,
            max_starts=collect.max_starts,
            try_timeout_s=collect.try_timeout_s,
            run=config.name,
            job_seed=config.seed,
            prices=config.prices,
            cache_dir=_cache_dir(config),
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


def _cache_dir(config: RunConfig) -> str | None:
    teacher = config.teacher
    if teacher.kind != "llm" or not teacher.cache:
        return None
    shared = expand_path("teacher.cache_dir", teacher.cache_dir) if teacher.cache_dir else None
    return place_of(shared or config.run_dir / "cache" / "teacher")


def _log(plan: EpisodePlan, trajectory: Trajectory) -> None:
    """A line in the log of this worker, which Ray keeps on its node."""
    ids = {
        "run": plan.run,
        "task": trajectory.task.task_id,
        "episode": trajectory.trajectory_id,
        "stop_reason": trajectory.stop_reason.value,
    }
    level = logging.WARNING if trajectory.error else logging.INFO
    told = f": {trajectory.error}" if trajectory.error else ""
    message = f"{plan.source.value} episode of {len(trajectory.steps)} steps ended{told}"
    logger.log(level, message, extra=ids)


class EpisodeRunner:
    """The Ray Data actor: plays many episodes at once on one event loop.

    Environment calls go to one thread per actor; LLM calls are awaited meanwhile. `__call__` never
    raises: what goes wrong comes back as a row. `desk` is the handle of the job's `TeacherDesk`.
    """

    def __init__(self, plan: EpisodePlan, desk: Any = None) -> None:
        quiet_clients()
        self._plan = plan
        self._desk = desk
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="env")
        self._student: OpenAIChat | None = None
        self._teacher: Teacher | None = None
        self._clients: list[OpenAIChat] = []
        self._gate: DeskGate | None = None

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
                timeout_s=min(plan.try_timeout_s, plan.settings.step_timeout_s),
                max_concurrency=plan.episodes_per_actor,
                price=plan.prices.get(plan.student.model),
                gate=TabGate(self._gate) if self._gate else None,
            )
            self._clients.append(self._student)
        return self._student

    def _make_teacher(self) -> Teacher | None:
        config = self._plan.teacher
        if config is None:
            return None
        if self._desk is not None and config.needs_desk:
            self._gate = DeskGate(self._serve)
        if config.kind == "oracle":
            return OracleTeacher(self._plan.env, self._gate)
        client = teacher_client(self._plan, config, self._gate)
        self._clients.append(client)
        cache = CallCache(self._plan.cache_dir) if self._plan.cache_dir else None
        return LLMTeacher(client, config, cache)

    async def _serve(
        self, asks: Sequence[Ask], settled: Sequence[Settled], pause_s: float
    ) -> Answer:
        answer: Answer = await self._desk.serve.remote(asks, settled, pause_s)
        return answer

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Play the episode of one manifest row.

        Returns:
            Its id; its record as JSON, empty when the budget let no episode start any more; and
            the line of an endpoint that refuses everybody, empty where none does.
        """
        seed = int(row["seed"])
        task = task_from_row({name: row[name] for name in TASK_SCHEMA.names})
        name = trajectory_id(task.task_id, self._plan.source, seed)
        try:
            trajectory = await self._counted(name, task, seed)
        except Exception as exc:
            # a raised error would drop the sibling episodes of this actor, so it becomes a row
            line = (str(exc).splitlines() or [""])[0]
            trajectory = failed_episode(task, self._plan, seed, f"{type(exc).__name__}: {line}")
        if trajectory is not None:
            _log(self._plan, trajectory)
        record = json.dumps(to_row(trajectory), ensure_ascii=False) if trajectory else ""
        refusal = next((client.refusal for client in self._clients if client.refusal), "")
        return {"trajectory_id": name, "record": record, "refusal": refusal}

    async def _counted(self, name: str, task: Task, seed: int) -> Trajectory | None:
        """The episode, if the desk lets it begin; the desk knows when it is over."""
        if self._desk is None:
            return await self._play(task, seed)
        start = await self._desk.start.remote(name)
        if start == Start.BUDGET:
            return None
        if start == Start.FATAL:
            times = self._plan.max_starts
            return failed_episode(
                task, self._plan, seed, f"collect.max_starts: {times} actors died while playing it"
            )
        try:
            return await self._play(task, seed)
        finally:
            await self._desk.end.remote(name)

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


def teacher_client(plan: EpisodePlan, config: TeacherConfig, gate: Gate | None) -> OpenAIChat:
    """A client of the teacher that the configuration names, behind its gate."""
    endpoint = Address(base_url=config.base_url, model=config.model, api_key_env=config.api_key_env)
    return endpoint.connect(
        timeout_s=config.try_timeout_s,
        call_timeout_s=config.timeout_s,
        max_concurrency=config.max_concurrency,
        price=plan.prices.get(config.model),
        gate=gate,
        extra_body=config.extra_body,
    )


def failed_episode(task: Task, plan: EpisodePlan, seed: int, error: str) -> Trajectory:
    """An episode of which nothing is known but that a fault of the machinery ended it."""
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
