"""The Ray Data job behind golden play, collection and evaluation: tasks -> trajectories.

Takes tasks and an `EpisodePlan`, gives Parquet shards in a folder and an
`EpisodesSummary`. One row is one episode; every failure is a row; a restart plays only what is
missing, was ended by a budget that has some left now, or, on request, ended by an error. Of an
episode that is on disk the driver keeps the id only. It trains and judges nothing itself.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import compress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from step_ray.calls.desk import TeacherDesk, read_ledger
from step_ray.calls.spending import Spending, budgeted_spending
from step_ray.collection.failures import ErrorWatch
from step_ray.collection.runner import EpisodePlan, EpisodeRunner
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.collection.totals import EpisodesSummary, Totals
from step_ray.config import CollectConfig
from step_ray.envs.base import Row, RowMapper
from step_ray.errors import ConfigError, DataError, EndpointError, EpisodesError, boundary
from step_ray.rollout import trajectory_id
from step_ray.storage.claim import claim_folder
from step_ray.storage.places import place_of
from step_ray.storage.records import from_row
from step_ray.storage.remote import for_libraries
from step_ray.storage.shardwriter import ShardWriter
from step_ray.store import Outcome, finished_ids, iter_outcomes, total_usage, write_rows
from step_ray.tasks import TASK_SCHEMA
from step_ray.types import ERROR_STOPS, StopReason, Task, Trajectory

Ended: TypeAlias = tuple[Trajectory, str]
"""An episode that has ended, and the line of an endpoint that refuses everybody, or nothing."""
EPISODE_SCHEMA = TASK_SCHEMA.append(pa.field("seed", pa.int64()))
LEDGER = "teacher_ledger.json"
"""File beside the shards with what the teacher was paid."""


class EpisodePlayer(Protocol):
    """Plays episodes: `ActorPlayer`, or `collection.agentplay.AgentPlayer` where the agent is."""

    num_restarts: int
    """Episodes that were begun more than once; known when all have ended."""

    def play(self, pending: Iterable[tuple[Task, int]]) -> Generator[Ended]:
        """The episodes of tasks and seeds as they end; closing it ends the others.

        Raises:
            EpisodesError, EndpointError: the rest cannot be played.
        """
        ...


def run_episodes(
    tasks: Iterable[Task],
    plan: EpisodePlan,
    out_dir: Path,
    *,
    seeds: Sequence[int] = (0,),
    on_episode: Callable[[Outcome], None] | None = None,
    on_begin: Callable[[], None] | None = None,
    player: EpisodePlayer | None = None,
) -> EpisodesSummary:
    """Play the episodes that `out_dir` does not have yet; Ray must be running.

    Args:
        tasks: what to play, each once per seed; gone through twice, never copied.
        plan: how.
        out_dir: folder of the trajectory shards; what is there is kept.
        seeds: seeds of the student's sampling.
        on_episode: called on the driver for each finished episode, those on disk first.
        on_begin: called between these and those that are played now.
        player: who plays; None: actors of the cluster.

    Raises:
        DataError: an episode is asked for twice.
        RunStateError: the folder belongs to another collection.
        EpisodesError: of all the episodes asked for, more than `plan` allows ended by an error, or
            too many of the first ones did; what has ended is on disk.
        EndpointError: an endpoint refuses key or model for good; what has ended is on disk.
    """
    started = time.monotonic()
    wanted = _wanted_ids(tasks, seeds, plan)
    out_dir.mkdir(parents=True, exist_ok=True)
    claim_folder(out_dir, plan.identity())
    spent = _spent(out_dir)
    is_done = pc.is_in(wanted, value_set=finished_ids(out_dir, _retried_stops(plan, spent)))
    kept = wanted.filter(is_done)
    watch = _error_watch(plan, len(wanted))
    if len(kept):
        _count_old(out_dir, kept, watch, on_episode)
    if on_begin is not None:
        on_begin()
    player = player or ActorPlayer(plan, out_dir, spent)
    if len(kept) < len(wanted):
        pending = compress(_pairs(tasks, seeds), (not done.as_py() for done in is_done))
        _play_pending(pending, player, out_dir, plan.rows_per_shard, watch, on_episode)
    return _count_all(out_dir, wanted, plan).summary(
        num_resumed=len(kept),
        seconds=time.monotonic() - started,
        num_wanted=len(wanted),
        spent=_spent(out_dir),
        num_restarts=player.num_restarts,
    )


def _count_old(
    out_dir: Path, kept: pa.Array, watch: ErrorWatch, on_episode: Callable[[Outcome], None] | None
) -> None:
    for outcome in iter_outcomes(out_dir, kept):
        watch.add(outcome, is_old=True)
        if on_episode is not None:
            on_episode(outcome)
    if watch.fault:  # nothing that is played now can mend it
        raise EpisodesError(watch.fault)


def _count_all(out_dir: Path, wanted: pa.Array, plan: EpisodePlan) -> Totals:
    watch, totals = _error_watch(plan, len(wanted)), Totals()
    for outcome in iter_outcomes(out_dir, wanted):
        watch.add(outcome)
        totals.add(outcome)
    if watch.fault:
        raise EpisodesError(watch.fault)
    return totals


def _pairs(tasks: Iterable[Task], seeds: Sequence[int]) -> Iterator[tuple[Task, int]]:
    return ((task, seed) for task in tasks for seed in seeds)


def _wanted_ids(tasks: Iterable[Task], seeds: Sequence[int], plan: EpisodePlan) -> pa.Array:
    """The ids as large strings, which take a third of the memory of Python's."""
    names = (trajectory_id(t.task_id, plan.source, seed) for t, seed in _pairs(tasks, seeds))
    wanted = pa.array(names, pa.large_string())
    if pc.count_distinct(wanted).as_py() < len(wanted):
        counts = wanted.value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()
        name, count = twice[0]["values"], twice[0]["counts"]
        raise DataError(
            f"tasks: {len(twice)} episodes are asked for more than once, first {name!r}"
            f" ({count} times); list each task and each seed once"
        )
    return wanted


def _error_watch(plan: EpisodePlan, num_wanted: int) -> ErrorWatch:
    return ErrorWatch(
        num_wanted=num_wanted,
        max_share=plan.max_error_share,
        max_errors=plan.max_errors,
        judged_after=plan.errors_judged_after,
    )


def _spent(out_dir: Path) -> Spending:
    """What the collection has taken from its budget: the rows know most, the ledger the rest."""
    return budgeted_spending([total_usage(out_dir)]).or_more(read_ledger(out_dir / LEDGER))


def _retried_stops(plan: EpisodePlan, spent: Spending) -> frozenset[StopReason]:
    """Ends that are played again: an empty budget once there is some left, faults on request."""
    is_spent = plan.teacher is not None and plan.teacher.budget.refusal(spent) is not None
    again = frozenset[StopReason]() if is_spent else frozenset({StopReason.BUDGET})
    return again | (ERROR_STOPS if plan.retry_errors else frozenset())


def _play_pending(
    pending: Iterable[tuple[Task, int]],
    player: EpisodePlayer,
    out_dir: Path,
    rows_per_shard: int,
    watch: ErrorWatch,
    on_episode: Callable[[Outcome], None] | None,
) -> None:
    """Play and keep."""
    # however the block is left: first what has ended goes to disk, then actors and calls end
    with closing(player.play(pending)) as ended, ShardWriter(out_dir, rows_per_shard) as writer:
        for trajectory, refusal in ended:
            writer.add(trajectory)
            outcome = Outcome.of(trajectory)
            if on_episode:
                on_episode(outcome)
            watch.add(outcome)
            _stop_if_hopeless(refusal, watch)


def _stop_if_hopeless(refusal: str, watch: ErrorWatch) -> None:
    if refusal:
        raise EndpointError(
            f"{refusal}; stopped, what has ended is kept: mend key, model or address, then"
            " --retry-errors with the same command goes on"
        )
    if watch.forecast:
        raise EpisodesError(f"stopped, what has ended is kept: {watch.forecast}")


class ActorPlayer:
    """Plays on the cluster's actors; what the teacher is paid is counted at one desk.

    Args:
        plan: how.
        out_dir: folder of the collection; the manifest of what is to be played goes there.
        spent: of the budget, before.
    """

    def __init__(self, plan: EpisodePlan, out_dir: Path, spent: Spending) -> None:
        self._plan, self._out_dir, self._spent = plan, out_dir, spent
        self.num_restarts = 0

    def play(self, pending: Iterable[tuple[Task, int]]) -> Generator[Ended]:
        """See `EpisodePlayer`."""
        manifest = self._out_dir / "manifest" / "pending.parquet"
        _write_manifest(manifest, pending)
        desk = _make_desk(self._plan, self._spent, self._out_dir / LEDGER)
        num_ended = 0
        try:
            with closing(_episode_rows(manifest, self._plan, desk)) as rows:
                for row in rows:
                    if row["record"]:  # empty: the budget let it not begin
                        num_ended += 1
                        yield from_row(json.loads(row["record"])), row["refusal"]
            self.num_restarts = max(0, int(ray.get(desk.num_starts.remote())) - num_ended)
        finally:
            ray.get(desk.close.remote())


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
    book = place_of(ledger) if teacher.needs_desk else None
    return actor.remote(teacher, spent, book, max_starts=plan.max_starts)


def _episode_rows(manifest: Path, plan: EpisodePlan, desk: Any) -> Generator[dict[str, Any]]:
    """The Ray Data pipeline: one row is one block is one episode, see ray.data docs on blocks."""
    _quieten()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # else a thread per episode in flight asks for the actor's memory every second
    context.memory_usage_poll_interval_s = None
    context.execution_no_progress_timeout_s = int(2 * plan.settings.episode_timeout_s + 1800)
    path, filesystem = for_libraries(manifest)
    dataset = (
        ray.data.read_parquet(path, filesystem=filesystem)
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


def _quieten() -> None:
    """Ray Data sets its own level when it is imported, so ours is set where it is used."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # it warns that its bars are off, which is what we ask for
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def row_mapper(config: CollectConfig) -> RowMapper:
    """Runs a class over rows on the actors and nodes of a collection; Ray must be running."""

    def run(
        worker: type[Callable[[Row], Row]], arguments: Mapping[str, Any], rows: Sequence[Row]
    ) -> Iterator[Row]:
        _quieten()
        dataset = (
            ray.data.from_items(list(rows))
            .repartition(target_num_rows_per_block=1, strict=True)
            .map(
                worker,
                fn_constructor_kwargs=dict(arguments),
                num_cpus=config.cpus_per_actor,
                label_selector=dict(config.node_labels) or None,
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


def read_key(setting: str, variable: str) -> str:
    """The API key in an environment variable.

    Raises:
        ConfigError: the variable that the setting names is not set.
    """
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"{setting}: {variable!r} is not set; export the key")
    return key
