"""The Ray Data job behind golden play, collection and evaluation: tasks -> trajectories.

Takes tasks and an `EpisodePlan`, gives Parquet shards in a folder and an `EpisodesSummary`. One row
is one episode; every failure is a row; a restart plays only what is missing, ended by an error, or
ended by a budget that has some left now. Of an episode that is on disk the driver keeps the id
only. It trains and judges nothing itself.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from step_ray.compact import Compactor
from step_ray.config import CollectConfig
from step_ray.desk import TeacherDesk, read_ledger
from step_ray.envs.base import Row, RowMapper
from step_ray.errors import ConfigError
from step_ray.records import from_row
from step_ray.rollout import trajectory_id
from step_ray.runner import EpisodePlan, EpisodeRunner
from step_ray.spending import Spending, teacher_spending
from step_ray.store import (
    Outcome,
    finished_ids,
    iter_outcomes,
    total_usage,
    write_rows,
    write_shard,
)
from step_ray.tally import EpisodesSummary, Tally
from step_ray.tasks import TASK_SCHEMA
from step_ray.teacher_config import TeacherConfig
from step_ray.types import ERROR_STOPS, StopReason, Task, Trajectory

EPISODE_SCHEMA = TASK_SCHEMA.append(pa.field("seed", pa.int64()))
LEDGER = "teacher_ledger.json"
"""File beside the shards with what the teacher was paid."""
FLUSH_S = 10.0
"""Finished episodes wait at most this long for a full shard."""


def run_episodes(
    tasks: Iterable[Task],
    plan: EpisodePlan,
    out_dir: Path,
    *,
    seeds: Sequence[int] = (0,),
    on_episode: Callable[[Outcome], None] | None = None,
) -> EpisodesSummary:
    """Play the episodes that `out_dir` does not have yet; Ray must be running.

    Args:
        tasks: what to play, each once per seed; gone through twice, never copied.
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
    names = (trajectory_id(t.task_id, plan.source, seed) for t, seed in _pairs(tasks, seeds))
    wanted = pa.array(names, pa.large_string())
    is_done = pc.is_in(wanted, value_set=finished_ids(out_dir, _retried_stops(plan, spent)))
    kept = wanted.filter(is_done)
    if len(kept) and on_episode is not None:
        for outcome in iter_outcomes(out_dir, kept):
            on_episode(outcome)
    if len(kept) < len(wanted):
        todo = (
            p for p, done in zip(_pairs(tasks, seeds), is_done, strict=True) if not done.as_py()
        )
        _play_pending(todo, plan, out_dir, spent, on_episode)
    tally = Tally()
    for outcome in iter_outcomes(out_dir, wanted):
        tally.add(outcome)
    tally.refuse_errors(plan.max_error_share)
    return tally.summary(
        num_resumed=len(kept),
        seconds=time.monotonic() - started,
        num_wanted=len(wanted),
        spent=_spent(out_dir),
    )


def _pairs(tasks: Iterable[Task], seeds: Sequence[int]) -> Iterator[tuple[Task, int]]:
    return ((task, seed) for task in tasks for seed in seeds)


def _spent(out_dir: Path) -> Spending:
    """What the collection has paid to its teacher: the rows know most, the ledger the rest."""
    return teacher_spending([total_usage(out_dir)]).or_more(read_ledger(out_dir / LEDGER))


def _retried_stops(plan: EpisodePlan, spent: Spending) -> frozenset[StopReason]:
    """Ends that are played again: faults, and an empty budget once there is some left to spend."""
    is_spent = plan.teacher is not None and plan.teacher.budget.refusal(spent) is not None
    return ERROR_STOPS | (set() if is_spent else {StopReason.BUDGET})


def _play_pending(
    pending: Iterable[tuple[Task, int]],
    plan: EpisodePlan,
    out_dir: Path,
    spent: Spending,
    on_episode: Callable[[Outcome], None] | None,
) -> None:
    manifest = out_dir / "manifest" / "pending.parquet"
    _write_manifest(manifest, pending)
    desk = _make_desk(plan, spent, out_dir / LEDGER)
    try:
        with _Shards(out_dir, plan.rows_per_shard) as shards:
            for row in _episode_rows(manifest, plan, desk):
                if not row["record"]:
                    continue
                trajectory = from_row(json.loads(row["record"]))
                shards.add(trajectory)
                if on_episode:
                    on_episode(Outcome.of(trajectory))
    finally:
        if desk is not None:
            ray.get(desk.close.remote())


class _Shards:
    """Finished episodes on their way to disk; few wait, none long, however the block ends."""

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self._folder, self._rows = folder, rows_per_shard
        self._waiting: list[Trajectory] = []
        self._flushed = time.monotonic()
        self._compactor = Compactor(folder)

    def __enter__(self) -> "_Shards":
        self._compactor.__enter__()
        return self

    def add(self, trajectory: Trajectory) -> None:
        """Keep an episode, and write those that wait if they are many or have waited long."""
        self._waiting.append(trajectory)
        if len(self._waiting) >= self._rows or time.monotonic() - self._flushed > FLUSH_S:
            self._write()

    def _write(self) -> None:
        write_shard(self._folder, self._waiting)
        self._waiting, self._flushed = [], time.monotonic()
        self._compactor.wrote()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._waiting:
                self._write()
        finally:
            self._compactor.__exit__(kind, exc, trace)


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


def _write_manifest(path: Path, pairs: Iterable[tuple[Task, int]]) -> None:
    rows = (
        {name: getattr(task, name) for name in TASK_SCHEMA.names[:-1]}
        | {"params": json.dumps(dict(task.params), sort_keys=True), "seed": seed}
        for task, seed in pairs
    )
    write_rows(path, EPISODE_SCHEMA, rows)


def check_teacher_key(config: TeacherConfig) -> str:
    """The teacher's API key from the environment.

    Raises:
        ConfigError: an LLM teacher is configured and the variable is not set.
    """
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(f"teacher.api_key_env: {config.api_key_env!r} is not set; export the key")
    return key
