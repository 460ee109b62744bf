"""The Ray Data job behind golden play, collection and evaluation: tasks -> episodes -> trajectories.

Takes a list of tasks and an `EpisodePlan`, gives Parquet shards in a folder and an
`EpisodesSummary`. One row is one episode; every failure is a row; a restart plays only what is
missing or ended by an error. It trains and judges nothing itself.
"""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from step_ray.config import CollectConfig, RunConfig, TeacherConfig
from step_ray.envs import make_env
from step_ray.errors import BudgetError, ConfigError, EnvError
from step_ray.llm import ChatModel, OpenAIChat
from step_ray.rollout import EpisodeSettings, run_episode, trajectory_id
from step_ray.store import (
    completed_ids,
    from_row,
    read_trajectories,
    to_row,
    write_shard,
    write_table,
)
from step_ray.tasks import TASK_SCHEMA, task_from_row
from step_ray.teacher import ExpertStudent, Judgement, LLMTeacher, OracleTeacher, StepView, Teacher
from step_ray.types import ERROR_STOPS, Source, Step, StopReason, Task, Trajectory

EPISODE_SCHEMA = TASK_SCHEMA.append(pa.field("seed", pa.int64()))
FLUSH_S = 10.0
"""Finished episodes wait at most this long for a full shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a model answers."""

    base_url: str
    model: str
    api_key_env: str = ""

    def connect(self, *, timeout_s: float, max_concurrency: int) -> OpenAIChat:
        """A client; made on the actor, so that the key is read there and never travels."""
        return OpenAIChat(
            base_url=self.base_url,
            model=self.model,
            api_key=os.environ.get(self.api_key_env, "none") if self.api_key_env else "none",
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
            settings=EpisodeSettings.from_config(config, temperature=temperature),
            env=config.env.name,
            env_options={"engine": config.env.engine},
            student=student,
            teacher=teacher,
            references=references or {},
            num_actors=collect.num_actors,
            episodes_per_actor=1
            if one_at_a_time
            else episodes_per_actor or collect.episodes_per_actor,
            cpus_per_actor=collect.cpus_per_actor,
            rows_per_shard=collect.rows_per_shard,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodesSummary:
    """What a stage of episodes has on disk at its end."""

    num_episodes: int
    num_resumed: int
    """Episodes that were already there."""
    num_success: int
    num_errors: int
    stop_reasons: dict[str, int]
    num_steps: int
    teacher_calls: int
    teacher_tokens: int
    retries: int
    seconds: float


@ray.remote(num_cpus=0)
class CallBudget:
    """Counts teacher calls over all actors of a collection."""

    def __init__(self, limit: int, spent: int) -> None:
        self._limit, self._spent = limit, spent

    def take(self) -> bool:
        """Spend one call; False when none is left."""
        self._spent += 1
        return self._spent <= self._limit


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
            raise BudgetError(f"teacher.max_calls: {self._limit} calls are spent; raise it")
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

    def _open(self) -> ChatModel:
        """Clients are made inside the event loop that uses them."""
        plan = self._plan
        if self._student is None:
            self._student = (
                plan.student.connect(
                    timeout_s=plan.settings.step_timeout_s,
                    max_concurrency=plan.episodes_per_actor,
                )
                if plan.student
                else ExpertStudent(plan.env)
            )
            self._teacher = self._make_teacher()
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
        student = self._open()
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


def run_episodes(
    tasks: Sequence[Task],
    plan: EpisodePlan,
    out_dir: Path,
    *,
    seeds: Sequence[int] = (0,),
    on_episode: Callable[[Trajectory], None] | None = None,
) -> EpisodesSummary:
    """Play the episodes that `out_dir` does not have yet; Ray must be running.

    Args:
        tasks: what to play, each once per seed.
        plan: how.
        out_dir: folder of the trajectory shards; what is there is kept.
        seeds: seeds of the student's sampling.
        on_episode: called on the driver for each finished episode, those on disk first.

    Raises:
        EnvError: every episode of this call ended by an error; the line quotes the first.
    """
    started = time.monotonic()
    done = completed_ids(out_dir)
    pairs = [(task, seed) for task in tasks for seed in seeds]
    wanted = {trajectory_id(task.task_id, plan.source, seed) for task, seed in pairs}
    pending = [p for p in pairs if trajectory_id(p[0].task_id, plan.source, p[1]) not in done]
    kept = [t for t in read_trajectories(out_dir) if t.trajectory_id in done & wanted]
    for trajectory in kept if on_episode else ():
        on_episode(trajectory)
    if pending:
        fresh = _play_pending(pending, plan, out_dir, _spent(kept), on_episode)
        _refuse_all_errors(fresh)
    return summarize_episodes(
        [t for t in read_trajectories(out_dir) if t.trajectory_id in wanted],
        num_resumed=len(kept),
        seconds=time.monotonic() - started,
    )


def _play_pending(
    pending: Sequence[tuple[Task, int]],
    plan: EpisodePlan,
    out_dir: Path,
    spent: int,
    on_episode: Callable[[Trajectory], None] | None,
) -> list[Trajectory]:
    manifest = out_dir / "manifest" / "pending.parquet"
    _write_manifest(manifest, pending)
    shard: list[Trajectory] = []
    fresh: list[Trajectory] = []
    flushed = time.monotonic()
    try:
        for row in _episode_rows(manifest, plan, spent):
            trajectory = from_row(json.loads(row["record"]))
            shard.append(trajectory)
            fresh.append(trajectory)
            if on_episode:
                on_episode(trajectory)
            if len(shard) >= plan.rows_per_shard or time.monotonic() - flushed > FLUSH_S:
                write_shard(out_dir, shard)
                shard, flushed = [], time.monotonic()
    finally:
        if shard:
            write_shard(out_dir, shard)
    return fresh


def _episode_rows(manifest: Path, plan: EpisodePlan, spent: int) -> Iterator[dict[str, Any]]:
    """The Ray Data pipeline: one row is one block is one episode, see ray.data docs on blocks."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = int(2 * plan.settings.episode_timeout_s + 1800)
    limit = plan.teacher.max_calls if plan.teacher else None
    budget = CallBudget.remote(limit, spent) if limit is not None else None  # type: ignore[attr-defined]
    dataset = (
        ray.data.read_parquet(str(manifest.resolve()))
        .repartition(target_num_rows_per_block=1, strict=True)
        .map(
            EpisodeRunner,
            fn_constructor_kwargs={"plan": plan, "budget": budget},
            num_cpus=plan.cpus_per_actor,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=plan.num_actors,
                max_concurrent_calls_per_actor=plan.episodes_per_actor,
            ),
        )
    )
    yield from dataset.iter_rows()


def _write_manifest(path: Path, pairs: Sequence[tuple[Task, int]]) -> None:
    columns: dict[str, list[Any]] = {
        name: [getattr(task, name) for task, _ in pairs] for name in TASK_SCHEMA.names[:-1]
    }
    columns["params"] = [json.dumps(dict(task.params), sort_keys=True) for task, _ in pairs]
    columns["seed"] = [seed for _, seed in pairs]
    write_table(path, pa.table(columns, schema=EPISODE_SCHEMA))


def _spent(trajectories: Sequence[Trajectory]) -> int:
    return sum(t.usage.teacher_calls for t in trajectories)


def _refuse_all_errors(fresh: Sequence[Trajectory]) -> None:
    """A stage in which nothing worked is a broken set-up, not a result."""
    if fresh and all(t.stop_reason in ERROR_STOPS for t in fresh):
        first = fresh[0]
        raise EnvError(
            f"all {len(fresh)} episodes failed; first: {first.stop_reason}: {first.error}"
        )


def summarize_episodes(
    trajectories: Sequence[Trajectory], *, num_resumed: int, seconds: float
) -> EpisodesSummary:
    """Count what is on disk."""
    stops = Counter(t.stop_reason.value for t in trajectories)
    return EpisodesSummary(
        num_episodes=len(trajectories),
        num_resumed=num_resumed,
        num_success=sum(t.success for t in trajectories),
        num_errors=sum(t.stop_reason in ERROR_STOPS for t in trajectories),
        stop_reasons=dict(sorted(stops.items())),
        num_steps=sum(len(t.steps) for t in trajectories),
        teacher_calls=_spent(trajectories),
        teacher_tokens=sum(
            t.usage.teacher_prompt_tokens + t.usage.teacher_completion_tokens for t in trajectories
        ),
        retries=sum(t.usage.retries for t in trajectories),
        seconds=seconds,
    )


def check_teacher_key(config: TeacherConfig) -> str:
    """The teacher's API key from the environment.

    Raises:
        ConfigError: an LLM teacher is configured and the variable is not set.
    """
    key = os.environ.get(config.api_key_env)
    if key is None:
        raise ConfigError(
            f"teacher.api_key_env: {config.api_key_env!r} is not set; export it (any text if unused)"
        )
    return key
