"""The Ray Data job behind golden play, collection and evaluation: tasks -> trajectories.

Takes a list of tasks and an `EpisodePlan`, gives Parquet shards in a folder and an
`EpisodesSummary`. One row is one episode; every failure is a row; a restart plays only what is
missing, ended by an error, or ended by a budget that has some left now. It trains and judges
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from step_ray.config import CollectConfig
from step_ray.desk import TeacherDesk, read_ledger
from step_ray.envs.base import Row, RowMapper
from step_ray.errors import ConfigError, EpisodesError
from step_ray.rollout import trajectory_id
from step_ray.runner import EpisodePlan, EpisodeRunner
from step_ray.spending import Spending, teacher_spending
from step_ray.store import (
    completed_ids,
    from_row,
    read_trajectories,
    read_usages,
    write_shard,
    write_table,
)
from step_ray.tasks import TASK_SCHEMA
from step_ray.teacher_config import TeacherConfig
from step_ray.types import ERROR_STOPS, StopReason, Task, Trajectory

EPISODE_SCHEMA = TASK_SCHEMA.append(pa.field("seed", pa.int64()))
LEDGER = "teacher_ledger.json"
"""File beside the shards with what the teacher was paid."""
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
    num_not_started: int = 0
    """Episodes that were asked for and that the teacher's budget let not begin."""
    teacher_cached_calls: int = 0
    """Replies that were read from the cache; not among `teacher_calls`."""
    teacher_unstructured_calls: int = 0
    """Of `teacher_calls`: without a schema, because the endpoint refuses one."""
    cache_faults: int = 0
    """Entries of the cache that could not be read or written."""
    teacher_cost: float = 0.0
    student_cost: float = 0.0
    """Money, by the price table, of the episodes that count."""
    spent_calls: int = 0
    spent_tokens: int = 0
    spent_money: float = 0.0
    """Paid to the teacher so far, for episodes that were lost or played again too."""

    def notices(self) -> list[str]:
        """What somebody who waits for a collection must not overlook."""
        lines = {
            "episodes did not begin, because the teacher's budget is spent; raise teacher.budget"
            " and the same command goes on": self.num_not_started,
            "teacher calls went without a schema: the endpoint has no response_format"
            " json_schema": self.teacher_unstructured_calls,
            "entries of the teacher's cache could not be read or written": self.cache_faults,
            "teacher replies came from the cache": self.teacher_cached_calls,
        }
        return [f"{count:,} {line}" for line, count in lines.items() if count]


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
    spent = _spent(out_dir)
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
    return summarize_episodes(
        played,
        num_resumed=len(kept),
        seconds=time.monotonic() - started,
        num_wanted=len(wanted),
        spent=_spent(out_dir),
    )


def _spent(out_dir: Path) -> Spending:
    """What the collection has paid to its teacher: the rows know most, the ledger the rest."""
    return teacher_spending(read_usages(out_dir)).or_more(read_ledger(out_dir / LEDGER))


def _retried_stops(plan: EpisodePlan, spent: Spending) -> frozenset[StopReason]:
    """Ends that are played again: faults, and an empty budget once there is some left to spend."""
    is_spent = plan.teacher is not None and plan.teacher.budget.refusal(spent) is not None
    return ERROR_STOPS | (set() if is_spent else {StopReason.BUDGET})


def _play_pending(
    pending: Sequence[tuple[Task, int]],
    plan: EpisodePlan,
    out_dir: Path,
    spent: Spending,
    on_episode: Callable[[Trajectory], None] | None,
) -> None:
    manifest = out_dir / "manifest" / "pending.parquet"
    _write_manifest(manifest, pending)
    shard: list[Trajectory] = []
    flushed = time.monotonic()
    desk = _make_desk(plan, spent, out_dir / LEDGER)
    try:
        for row in _episode_rows(manifest, plan, desk):
            if not row["record"]:
                continue
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
        if desk is not None:
            ray.get(desk.close.remote())


def _make_desk(plan: EpisodePlan, spent: Spending, ledger: Path) -> Any:
    """The actor that counts over all others, where something is to be counted.

    It stays on the driver's node, which has the run folder; when it dies it starts again from its
    ledger.
    """
    if plan.teacher is None or not plan.teacher.needs_desk:
        return None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(TeacherDesk).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor.remote(plan.teacher, spent, ledger.resolve())


def _episode_rows(manifest: Path, plan: EpisodePlan, desk: Any) -> Iterator[dict[str, Any]]:
    """The Ray Data pipeline: one row is one block is one episode, see ray.data docs on blocks."""
    # it warns that its bars are off, which is what the next lines ask for
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = int(2 * plan.settings.episode_timeout_s + 1800)
    dataset = (
        ray.data.read_parquet(str(manifest.resolve()))
        .repartition(target_num_rows_per_block=1, strict=True)
        .map(
            EpisodeRunner,
            fn_constructor_kwargs={"plan": plan, "desk": desk},
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
    trajectories: Sequence[Trajectory],
    *,
    num_resumed: int,
    seconds: float,
    num_wanted: int | None = None,
    spent: Spending | None = None,
) -> EpisodesSummary:
    """Count what is on disk.

    Args:
        trajectories: the episodes that count, each once.
        num_resumed: how many were there before.
        seconds: wall time.
        num_wanted: episodes that were asked for; None: those that are there.
        spent: what the teacher was paid in all; None: what these episodes show.
    """
    stops = Counter(t.stop_reason.value for t in trajectories)
    usages = [t.usage for t in trajectories]
    paid = teacher_spending(usages)
    spent = spent or paid
    return EpisodesSummary(
        num_episodes=len(trajectories),
        num_resumed=num_resumed,
        num_success=sum(t.success for t in trajectories),
        num_errors=sum(t.stop_reason in ERROR_STOPS for t in trajectories),
        stop_reasons=dict(sorted(stops.items())),
        num_steps=sum(len(t.steps) for t in trajectories),
        teacher_calls=paid.calls,
        teacher_tokens=paid.tokens,
        retries=sum(usage.retries for usage in usages),
        seconds=seconds,
        num_not_started=max(0, (num_wanted or 0) - len(trajectories)),
        teacher_cached_calls=sum(usage.teacher_cached_calls for usage in usages),
        teacher_unstructured_calls=sum(usage.teacher_unstructured_calls for usage in usages),
        cache_faults=sum(usage.cache_faults for usage in usages),
        teacher_cost=paid.money,
        student_cost=sum(usage.student_cost for usage in usages),
        spent_calls=spent.calls,
        spent_tokens=spent.tokens,
        spent_money=spent.money,
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
