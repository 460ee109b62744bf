"""The Ray Data job behind golden play, collection and evaluation: tasks -> trajectories.

Takes a list of tasks and an `EpisodePlan`, gives Parquet shards in a folder and an
`EpisodesSummary`. One row is one episode; every failure is a row; a restart plays only what is
missing, ended by an error, or ended by a budget that has calls left now. It trains and judges
nothing itself.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from step_ray.config import CollectConfig
from step_ray.envs.base import Row, RowMapper
from step_ray.errors import ConfigError, EpisodesError
from step_ray.rollout import trajectory_id
from step_ray.runner import EpisodePlan, EpisodeRunner
from step_ray.store import (
    completed_ids,
    from_row,
    num_teacher_calls,
    read_trajectories,
    write_shard,
    write_table,
)
from step_ray.tasks import TASK_SCHEMA
from step_ray.teacher_config import TeacherConfig
from step_ray.types import ERROR_STOPS, StopReason, Task, Trajectory

EPISODE_SCHEMA = TASK_SCHEMA.append(pa.field("seed", pa.int64()))
FLUSH_S = 10.0
"""Finished episodes wait at most this long for a full shard."""


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
        EpisodesError: of all the episodes asked for, more than `plan.max_error_share` ended by an
            error; what is on disk stays, and the next call plays these again.
    """
    started = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    spent = num_teacher_calls(out_dir)
    done = completed_ids(out_dir, retry=_retried_stops(plan, spent))
    pairs = [(task, seed) for task in tasks for seed in seeds]
    wanted = {trajectory_id(task.task_id, plan.source, seed) for task, seed in pairs}
    pending = [p for p in pairs if trajectory_id(p[0].task_id, plan.source, p[1]) not in done]
    kept = [t for t in read_trajectories(out_dir) if t.trajectory_id in done & wanted]
    if on_episode is not None:
        for trajectory in kept:
            on_episode(trajectory)
    if pending:
        _play_pending(pending, plan, out_dir, spent, on_episode)
    played = [t for t in read_trajectories(out_dir) if t.trajectory_id in wanted]
    _refuse_errors(played, plan.max_error_share)
    return summarize_episodes(played, num_resumed=len(kept), seconds=time.monotonic() - started)


def _retried_stops(plan: EpisodePlan, spent: int) -> frozenset[StopReason]:
    """Ends that are played again: faults, and an empty budget once there are calls to spend."""
    limit = plan.teacher.max_calls if plan.teacher else None
    calls_left = limit is None or spent < limit
    return ERROR_STOPS | ({StopReason.BUDGET} if calls_left else set())


def _play_pending(
    pending: Sequence[tuple[Task, int]],
    plan: EpisodePlan,
    out_dir: Path,
    spent: int,
    on_episode: Callable[[Trajectory], None] | None,
) -> None:
    manifest = out_dir / "manifest" / "pending.parquet"
    _write_manifest(manifest, pending)
    shard: list[Trajectory] = []
    flushed = time.monotonic()
    try:
        for row in _episode_rows(manifest, plan, spent):
            trajectory = from_row(json.loads(row["record"]))
            shard.append(trajectory)
            if on_episode:
                on_episode(trajectory)
            if len(shard) >= plan.rows_per_shard or time.monotonic() - flushed > FLUSH_S:
                write_shard(out_dir, shard)
                shard, flushed = [], time.monotonic()
    finally:
        if shard:
            write_shard(out_dir, shard)


def _episode_rows(manifest: Path, plan: EpisodePlan, spent: int) -> Iterator[dict[str, Any]]:
    """The Ray Data pipeline: one row is one block is one episode, see ray.data docs on blocks."""
    # it warns that its bars are off, which is what the next lines ask for
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
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


def row_mapper(config: CollectConfig) -> RowMapper:
    """Runs a class over rows on as many actors as a collection has; Ray must be running."""

    def run(
        worker: type[Callable[[Row], Row]], arguments: Mapping[str, Any], rows: Sequence[Row]
    ) -> Iterator[Row]:
        dataset = (
            ray.data.from_items(list(rows))
            .repartition(target_num_rows_per_block=1, strict=True)
            .map(
                worker,
                fn_constructor_kwargs=dict(arguments),
                num_cpus=config.cpus_per_actor,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.num_actors),
            )
        )
        yield from dataset.iter_rows()

    return run


def _write_manifest(path: Path, pairs: Sequence[tuple[Task, int]]) -> None:
    columns: dict[str, list[Any]] = {
        name: [getattr(task, name) for task, _ in pairs] for name in TASK_SCHEMA.names[:-1]
    }
    columns["params"] = [json.dumps(dict(task.params), sort_keys=True) for task, _ in pairs]
    columns["seed"] = [seed for _, seed in pairs]
    write_table(path, pa.table(columns, schema=EPISODE_SCHEMA))


def _refuse_errors(played: Sequence[Trajectory], max_share: float) -> None:
    """A list with holes is no result: numbers made from it would be about the machinery."""
    faulty = [t for t in played if t.stop_reason in ERROR_STOPS]
    if len(faulty) <= max_share * len(played):
        return
    counts = Counter(t.stop_reason.value for t in faulty)
    raise EpisodesError(
        f"{len(faulty)} of {len(played)} episodes ended by an error"
        f" ({', '.join(f'{stop} {count}' for stop, count in sorted(counts.items()))}), more than"
        f" collect.max_error_share {max_share:g} allows; the same command plays these again"
        f" (first: {faulty[0].trajectory_id}: {faulty[0].error})"
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
        teacher_calls=sum(t.usage.teacher_calls for t in trajectories),
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
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(f"teacher.api_key_env: {config.api_key_env!r} is not set; export the key")
    return key
