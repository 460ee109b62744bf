"""The Ray Data job behind golden play, collection and evaluation: tasks -> trajectories.

Takes a list of tasks and an `EpisodePlan`, gives Parquet shards in a folder and an
`EpisodesSummary`. One row is one episode; every failure is a row; a restart plays only what is
missing, was ended by a budget that has some left now, or, on request, ended by an error. It trains
and judges nothing itself.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from step_ray.claim import claim_folder
from step_ray.config import CollectConfig
from step_ray.desk import TeacherDesk, read_ledger
from step_ray.envs.base import Row, RowMapper
from step_ray.errors import ConfigError, DataError, EndpointError, EpisodesError, boundary
from step_ray.failures import ErrorWatch
from step_ray.rollout import trajectory_id
from step_ray.runner import EpisodePlan, EpisodeRunner
from step_ray.shardwriter import ShardWriter
from step_ray.spending import Spending, teacher_spending
from step_ray.store import completed_ids, from_row, read_trajectories, read_usages, write_table
from step_ray.tasks import TASK_SCHEMA
from step_ray.teacher_config import TeacherConfig
from step_ray.types import ERROR_STOPS, StopReason, Task, Trajectory

EPISODE_SCHEMA = TASK_SCHEMA.append(pa.field("seed", pa.int64()))
LEDGER = "teacher_ledger.json"
"""File beside the shards with what the teacher was paid."""


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
    num_restarts: int = 0
    """Episodes of this start that were begun again, because their actor or its node was lost."""
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

    def unfinished(self) -> str:
        """What the budget kept from being played, and how to go on; empty when nothing was."""
        num_ended = self.stop_reasons.get(StopReason.BUDGET.value, 0)
        if not (self.num_not_started or num_ended):
            return ""
        return (
            f"the teacher's budget is spent: {self.num_not_started:,} episodes did not begin,"
            f" {num_ended:,} were ended on the way, {self.num_episodes - num_ended:,} are whole;"
            " raise teacher.budget and the same command goes on"
        )

    def notices(self) -> list[str]:
        """What somebody who waits for a collection must not overlook."""
        lines = {
            "episodes ended by an error and were not played again; --retry-errors plays"
            " them": self.num_errors,
            "episodes were begun again, because an actor or a node was lost": self.num_restarts,
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
    on_begin: Callable[[], None] | None = None,
) -> EpisodesSummary:
    """Play the episodes that `out_dir` does not have yet; Ray must be running.

    Args:
        tasks: what to play, each once per seed.
        plan: how.
        out_dir: folder of the trajectory shards; what is there is kept.
        seeds: seeds of the student's sampling.
        on_episode: called on the driver for each finished episode, those on disk first.
        on_begin: called between these and those that are played now.

    Raises:
        DataError: an episode is asked for twice.
        RunStateError: the folder belongs to another collection.
        EpisodesError: of all the episodes asked for, more than `plan` allows ended by an error, or
            too many of the first ones did; what has ended is on disk.
        EndpointError: an endpoint refuses key or model for good; what has ended is on disk.
    """
    started = time.monotonic()
    pairs = [(task, seed) for task in tasks for seed in seeds]
    wanted = _wanted_ids(pairs, plan)
    out_dir.mkdir(parents=True, exist_ok=True)
    claim_folder(out_dir, plan.identity())
    spent = _spent(out_dir)
    done = completed_ids(out_dir, retry=_retried_stops(plan, spent))
    pending = [p for p in pairs if trajectory_id(p[0].task_id, plan.source, p[1]) not in done]
    kept = [t for t in read_trajectories(out_dir) if t.trajectory_id in done & wanted]
    watch = _error_watch(plan, len(wanted))
    for trajectory in kept:
        watch.add(trajectory, is_old=True)
        if on_episode is not None:
            on_episode(trajectory)
    if watch.fault:  # nothing that is played now can mend it
        raise EpisodesError(watch.fault)
    if on_begin is not None:
        on_begin()
    num_restarts = 0
    if pending:
        num_restarts = _play_pending(pending, plan, out_dir, spent, watch, on_episode)
    played = [t for t in read_trajectories(out_dir) if t.trajectory_id in wanted]
    final = _error_watch(plan, len(wanted))
    for trajectory in played:
        final.add(trajectory)
    if final.fault:
        raise EpisodesError(final.fault)
    summary = summarize_episodes(
        played,
        num_resumed=len(kept),
        seconds=time.monotonic() - started,
        num_wanted=len(wanted),
        spent=_spent(out_dir),
    )
    return replace(summary, num_restarts=num_restarts)


def _wanted_ids(pairs: Sequence[tuple[Task, int]], plan: EpisodePlan) -> set[str]:
    counts = Counter(trajectory_id(task.task_id, plan.source, seed) for task, seed in pairs)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"tasks: {len(twice)} episodes are asked for more than once, first {twice[0]!r}"
            f" ({counts[twice[0]]} times); list each task and each seed once"
        )
    return set(counts)


def _error_watch(plan: EpisodePlan, num_wanted: int) -> ErrorWatch:
    return ErrorWatch(
        num_wanted=num_wanted,
        max_share=plan.max_error_share,
        max_errors=plan.max_errors,
        judged_after=plan.errors_judged_after,
    )


def _spent(out_dir: Path) -> Spending:
    """What the collection has paid to its teacher: the rows know most, the ledger the rest."""
    return teacher_spending(read_usages(out_dir)).or_more(read_ledger(out_dir / LEDGER))


def _retried_stops(plan: EpisodePlan, spent: Spending) -> frozenset[StopReason]:
    """Ends that are played again: an empty budget once there is some left, faults on request."""
    is_spent = plan.teacher is not None and plan.teacher.budget.refusal(spent) is not None
    again = frozenset[StopReason]() if is_spent else frozenset({StopReason.BUDGET})
    return again | (ERROR_STOPS if plan.retry_errors else frozenset())


def _play_pending(
    pending: Sequence[tuple[Task, int]],
    plan: EpisodePlan,
    out_dir: Path,
    spent: Spending,
    watch: ErrorWatch,
    on_episode: Callable[[Trajectory], None] | None,
) -> int:
    """Play and keep; gives how many episodes were begun more than once."""
    manifest = out_dir / "manifest" / "pending.parquet"
    _write_manifest(manifest, pending)
    desk = _make_desk(plan, spent, out_dir / LEDGER)
    num_ended = 0
    try:
        # however the block is left: first what has ended goes to disk, then actors and calls end
        with (
            closing(_episode_rows(manifest, plan, desk)) as rows,
            ShardWriter(out_dir, plan.rows_per_shard) as writer,
        ):
            for row in rows:
                trajectory = _keep(row, writer)
                if trajectory is None:
                    continue
                num_ended += 1
                if on_episode:
                    on_episode(trajectory)
                watch.add(trajectory)
                _stop_if_hopeless(row["refusal"], watch)
        return max(0, int(ray.get(desk.num_starts.remote())) - num_ended)
    finally:
        ray.get(desk.close.remote())


def _keep(row: Mapping[str, Any], writer: ShardWriter) -> Trajectory | None:
    if not row["record"]:
        return None
    trajectory = from_row(json.loads(row["record"]))
    writer.add(trajectory)
    return trajectory


def _stop_if_hopeless(refusal: str, watch: ErrorWatch) -> None:
    if refusal:
        raise EndpointError(
            f"{refusal}; stopped, what has ended is kept: mend key, model or address, then"
            " --retry-errors with the same command goes on"
        )
    if watch.forecast:
        raise EpisodesError(f"stopped, what has ended is kept: {watch.forecast}")


def _make_desk(plan: EpisodePlan, spent: Spending, ledger: Path) -> Any:
    """The actor that counts over all others.

    It stays on the driver's node, which has the run folder; when it dies it starts again from its
    ledger.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(TeacherDesk).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    teacher = plan.teacher or TeacherConfig()
    book = ledger.resolve() if teacher.needs_desk else None
    return actor.remote(teacher, spent, book, max_starts=plan.max_starts)


def _episode_rows(manifest: Path, plan: EpisodePlan, desk: Any) -> Generator[dict[str, Any]]:
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
            label_selector=dict(plan.node_labels) or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=plan.min_actors,
                max_size=plan.num_actors,
                max_concurrent_calls_per_actor=plan.episodes_per_actor,
            ),
        )
    )
    # iter_rows would hold each row back until the next one is there
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    with boundary(EpisodesError, "Ray Data stopped playing; what has ended is kept"):
        for batch in batches:
            yield from batch.to_pylist()


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


def read_key(setting: str, variable: str) -> str:
    """The API key in an environment variable.

    Raises:
        ConfigError: the variable that the setting names is not set.
    """
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"{setting}: {variable!r} is not set; export the key")
    return key
