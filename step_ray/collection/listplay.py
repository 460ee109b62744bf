"""Plays a task list for a stage, with what is to be seen of it while it runs.

Takes a stage's context and plan, gives the summary of what is on disk. How episodes are played is
collect.py's business.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from step_ray.collect import row_mapper, run_episodes
from step_ray.collection.metrics import EpisodeMetrics
from step_ray.collection.runner import EpisodePlan
from step_ray.collection.tally import Tally
from step_ray.config import RunConfig
from step_ray.envs import task_source
from step_ray.progress import Counter, Reporter
from step_ray.storage.runfolder import UNFINISHED
from step_ray.store import Outcome
from step_ray.tasks import read_tasks


class Context(Protocol):
    """What a stage works with."""

    config: RunConfig
    reporter: Reporter
    root: Path


class ShownEpisodes:
    """Finished episodes on the terminal and as Ray metrics."""

    def __init__(self, counter: Counter, tally: Tally, metrics: EpisodeMetrics) -> None:
        self._counter, self._tally, self._metrics = counter, tally, metrics
        self._has_begun = False

    def add(self, outcome: Outcome) -> None:
        """An episode that was there, or, after `begin`, one that ended now."""
        self._tally.add(outcome)
        if self._has_begun:
            self._metrics.add(outcome)
        self._metrics.show(self._tally)
        self._counter.update(self._tally.num_done, self._tally.line())

    def begin(self) -> None:
        """What comes now is played now."""
        self._has_begun = True
        self._tally.begin()


@contextmanager
def shown_episodes(
    reporter: Reporter, stage: str, total: int, money: float | None = None
) -> Iterator[ShownEpisodes]:
    """Show the episodes of a stage; `money` is the limit of its budget."""
    with reporter.counter(stage, total) as counter:
        yield ShownEpisodes(counter, Tally(total, money), EpisodeMetrics(stage))


def play_list(
    context: Context, plan: EpisodePlan, tasks: str, out: str, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Play `tasks/<tasks>.parquet` into the folder `out` of the run; gives the summary."""
    todo = read_tasks(context.root / "tasks" / f"{tasks}.parquet")
    if plan.uses_expert:
        source = task_source(context.config.env.name)
        todo = source.equip(context.config, todo, row_mapper(context.config.collect))
    total, name = len(todo) * len(seeds), Path(out).name
    money = plan.teacher.budget.money if plan.teacher else None
    with shown_episodes(context.reporter, name, total, money) as shown:
        summary = run_episodes(
            todo,
            plan,
            context.root / out,
            seeds=seeds,
            on_episode=shown.add,
            on_begin=shown.begin,
        )
    for line in summary.notices():
        context.reporter.line(f"  [yellow]{line}[/]")
    return {**asdict(summary), UNFINISHED: summary.unfinished()}
