"""Whole episodes on a server: the agent plays where it is served (`/v1/episodes`).

Takes a request and a player, gives records of episodes as they end and a report at last. It is the
episode loop of collection and evaluation; environments run on a thread beside the event loop.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from step_ray.collection.runner import Address, EpisodePlan
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.config import CollectConfig, RunConfig, StudentConfig, TasksConfig
from step_ray.env_config import EnvConfig
from step_ray.envs import REGISTRY, make_env, task_source
from step_ray.errors import StepRayError
from step_ray.evaluation.evalreport import summarize
from step_ray.llm import ChatModel
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.serving.api.agent_schemas import EpisodesRequest
from step_ray.serving.api.errors import ApiError, shown_name
from step_ray.serving.api.metrics import ServeMetrics
from step_ray.serving.config import AgentConfig
from step_ray.store import to_row
from step_ray.types import ERROR_STOPS, Source, Task, Trajectory

ALFWORLD_SPLITS = ("train", "valid_seen", "valid_unseen")
"""Those that may be generated; other environments know their splits themselves."""
RETRY_AFTER_S = 10
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One checked request."""

    request: EpisodesRequest
    tasks: list[Task]
    plan: EpisodePlan
    settings: EpisodeSettings
    scoring: str


class EpisodeService:
    """Plays the episodes of one replica.

    Args:
        config: limits and environments.
        metrics: counts the episodes.
    """

    def __init__(self, config: AgentConfig, metrics: ServeMetrics) -> None:
        self._config, self._metrics = config, metrics
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="env")
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._single = asyncio.Semaphore(1)
        """For engines that are global to the process."""
        self._lists: dict[tuple[str, str], list[Task]] = {}
        self._listing = asyncio.Lock()
        """So that requests that come together make a list once."""
        self.num_open = 0
        """Episodes that are asked for and not over."""

    async def open(
        self, request: EpisodesRequest, student: ChatModel
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Check a request and give its episodes, which are played while they are asked for.

        Raises:
            ApiError: 400 for what no server could play, 501 for an environment that is not
                installed here, 429 where too many episodes are open.
        """
        config = self._run_config(request)
        tasks = await self._tasks(config, request)
        if self.num_open + len(tasks) > self._config.max_episodes:
            self._refuse(len(tasks))
        plan = EpisodePlan.from_config(
            config,
            Source.STUDENT,
            student=Address(base_url="", model=student.name),
            temperature=request.temperature,
        )
        settings = plan.settings
        if request.max_steps is not None:
            settings = replace(settings, max_steps=request.max_steps, max_steps_by_type={})
        job = _Job(
            request=request,
            tasks=tasks,
            plan=plan,
            settings=settings,
            scoring=config.env.scoring,
        )
        return self._play(job, student)

    def _refuse(self, number: int) -> None:
        most = self._config.max_episodes
        if number > most:
            raise ApiError(400, f"{number} episodes asked for, {most} are allowed; ask for fewer")
        raise ApiError(
            429,
            f"{self.num_open} of {most} episodes are open, {number} more have no room; try again"
            " later",
            kind="server_error",
            code="overloaded",
            retry_after_s=RETRY_AFTER_S,
        )

    def _run_config(self, request: EpisodesRequest) -> RunConfig:
        """The run of which these are the episodes."""
        name, split = request.environment, request.split
        if name not in REGISTRY:
            known = sorted(REGISTRY)
            raise ApiError(
                400,
                f"{shown_name(name)} is no environment; use one of {known}",
                param="environment",
            )
        mine = self._config
        env = mine.envs.get(name) or EnvConfig(name=name)
        if name == "alfworld" and split not in ALFWORLD_SPLITS:
            raise ApiError(
                400, f"split {shown_name(split)}: use one of {ALFWORLD_SPLITS}", param="split"
            )
        other = "valid_unseen" if name == "alfworld" else "test"
        number = mine.num_generated
        is_train = split == "train"
        num_tokens = request.max_tokens or mine.max_new_tokens
        return RunConfig(
            name="episodes",
            output_dir=str(self._work_dir),
            # room for such an answer: whether it fits the model is checked turn by turn
            student=StudentConfig(max_length=max(2048, num_tokens + 1)),
            env=env,
            teacher=TeacherConfig(when="before_execution")
            if mine.before_execution
            else TeacherConfig(),
            tasks=TasksConfig(
                num_expert=max(1, number - 1) if is_train else 1,
                num_collect=1,
                num_eval=1 if is_train else number,
                eval_split=other if is_train else split,
            ),
            collect=CollectConfig(
                episodes_per_actor=mine.max_concurrency,
                max_new_tokens=num_tokens,
                max_format_errors=mine.max_format_errors,
                step_timeout_s=mine.step_timeout_s,
                episode_timeout_s=mine.episode_timeout_s,
            ),
        )

    @cached_property
    def _work_dir(self) -> Path:
        if self._config.work_dir:
            return Path(self._config.work_dir)
        return Path(tempfile.mkdtemp(prefix="step_ray_episodes_"))

    async def _tasks(self, config: RunConfig, request: EpisodesRequest) -> list[Task]:
        """The tasks asked for."""
        key = (request.environment, request.split)
        async with self._listing:
            if key not in self._lists:
                self._lists[key] = await self._beside(partial(_list_tasks, config, request.split))
        tasks = self._lists[key]
        if request.ids is None:
            return _draw(tasks, request)
        by_id = {task.task_id: task for task in tasks}
        unknown = [name for name in request.ids if name not in by_id]
        if unknown:
            raise ApiError(
                400,
                f"ids: {len(unknown)} of them are no tasks of this split, first"
                f" {shown_name(unknown[0])}",
                param="ids",
            )
        return [by_id[name] for name in request.ids]

    async def _beside(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _play(self, job: _Job, student: ChatModel) -> AsyncGenerator[dict[str, Any], None]:
        """Records as episodes end, then the report; closing the generator ends the episodes."""
        started = time.monotonic()
        most = min(job.request.concurrency or self._config.max_concurrency, len(job.tasks))
        mine = asyncio.Semaphore(most)
        self.num_open += len(job.tasks)
        waiting = {asyncio.create_task(self._one(job, task, student, mine)) for task in job.tasks}
        played: list[Trajectory] = []
        try:
            while waiting:
                left = started + self._config.timeout_s - time.monotonic()
                done, waiting = await asyncio.wait(
                    waiting, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for task in done:
                    played.append(task.result())
                    yield _record(played[-1], len(played), job.request.trajectories)
        finally:
            self.num_open -= len(job.tasks)
            for task in waiting:
                task.cancel()
        yield _report(job, played, student.name, time.monotonic() - started)

    async def _one(
        self, job: _Job, task: Task, student: ChatModel, mine: asyncio.Semaphore
    ) -> Trajectory:
        slots = self._single if job.plan.episodes_per_actor == 1 else self._slots
        async with mine, slots:
            env = await self._beside(partial(make_env, job.plan.env, **job.plan.env_options))
            try:
                trajectory = await run_episode(
                    task,
                    env,
                    student,
                    settings=job.settings,
                    source=Source.STUDENT,
                    seed=job.request.seed,
                    executor=self._executor,
                )
            finally:
                await self._beside(env.close)
        self._metrics.episode(trajectory.stop_reason.value)
        return trajectory


def _list_tasks(config: RunConfig, split: str) -> list[Task]:
    """All tasks of a split, by id.

    Raises:
        ApiError: the environment, its data or the split are not there.
    """
    try:
        make_env(config.env.name, **config.env.options()).close()
        source = task_source(config.env.name)
        source.check(config)
        source.prepare(config)
        is_train = split == "train"
        tasks = source.training_tasks(config) if is_train else source.held_out_tasks(config, split)
    except StepRayError as exc:
        if str(exc).startswith("tasks.eval_split"):
            raise ApiError(400, str(exc).removeprefix("tasks.eval_"), param="split") from exc
        raise ApiError(
            501,
            f"{config.env.name} cannot be played by this server: {exc}",
            kind="server_error",
            code="environment_not_installed",
            param="environment",
        ) from exc
    return sorted(tasks, key=lambda task: task.task_id)


def _draw(tasks: list[Task], request: EpisodesRequest) -> list[Task]:
    assert request.count is not None
    if request.count > len(tasks):
        raise ApiError(
            400,
            f"count: {request.count} asked for, {len(tasks)} tasks in this split; lower it",
            param="count",
        )
    drawn = random.Random(f"episodes/{request.seed}").sample(tasks, request.count)
    return sorted(drawn, key=lambda task: task.task_id)


def _record(trajectory: Trajectory, number: int, is_whole: bool) -> dict[str, Any]:
    """What the client sees of an episode."""
    return {
        "object": "episode",
        "number": number,
        "trajectory_id": trajectory.trajectory_id,
        "task_id": trajectory.task.task_id,
        "task_type": trajectory.task.task_type,
        "success": trajectory.success,
        "reward": trajectory.reward,
        "stop_reason": trajectory.stop_reason.value,
        "error": trajectory.error,
        "num_steps": len(trajectory.steps),
        "seconds": trajectory.usage.seconds,
        **({"trajectory": to_row(trajectory)} if is_whole else {}),
    }


def _report(job: _Job, played: list[Trajectory], model: str, seconds: float) -> dict[str, Any]:
    """The last record: how many there are, how many are missing, and what they show."""
    report = None
    if played:
        report = asdict(
            summarize(
                model,
                sorted(played, key=lambda trajectory: trajectory.trajectory_id),
                CONFIDENCE,
                seconds=seconds,
                seed=job.request.seed,
                scoring=job.scoring,
            )
        )
    return {
        "object": "episodes.report",
        "num_asked": len(job.tasks),
        "num_played": len(played),
        "num_missing": len(job.tasks) - len(played),
        "num_errors": sum(one.stop_reason in ERROR_STOPS for one in played),
        "report": report,
    }
