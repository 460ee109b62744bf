"""Success, mean reward and mean steps of an environment's expert, per task type.

Takes a config and tasks, gives the lines of a table. It plays in this process, without Ray.
"""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from step_ray.config import RunConfig
from step_ray.envs import make_env, task_source
from step_ray.envs.alfworld.parity import find_games
from step_ray.envs.base import Row
from step_ray.evaluation.stats import wilson_interval
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.teacher import ExpertStudent
from step_ray.tools.play import alfworld_task
from step_ray.types import Source, Task, Trajectory

ROW = "{:32}{:>7}{:>7}{:>8}{:>16}{:>12}{:>13}"


async def play_all(
    config: RunConfig, tasks: Sequence[Task], max_steps: int
) -> dict[str, list[Trajectory]]:
    """One episode per task, by task type."""
    env = make_env(config.env.name, **config.env.options())
    settings = EpisodeSettings(
        prompt=config.env.prompt,
        max_steps=max_steps,
        max_steps_by_type=config.env.max_steps_by_type,
    )
    episodes: dict[str, list[Trajectory]] = {}
    for task in tasks:
        episode = await run_episode(
            task, env, ExpertStudent(task), settings=settings, source=Source.EXPERT
        )
        episodes.setdefault(task.task_type, []).append(episode)
    env.close()
    return episodes


def game_tasks(folder: Path) -> list[Task]:
    """The ALFWorld games of a folder, with their types."""
    tasks = []
    for game in find_games(folder):
        task = alfworld_task(str(game), game.parent, seed=0)
        kind = game.parts[-3].partition("-")[0]
        tasks.append(
            Task(
                **{name: getattr(task, name) for name in ("task_id", "env", "split", "goal")},
                task_type=kind,
                params=task.params,
            )
        )
    return tasks


def config_tasks(config: RunConfig, split: str) -> list[Task]:
    """The tasks of a split that a configuration lists."""
    source = task_source(config.env.name)
    source.check(config)
    source.prepare(config)
    training = split == "train"
    return source.training_tasks(config) if training else source.held_out_tasks(config, split)


def one_by_one(
    worker: type[Callable[[Row], Row]], arguments: Mapping[str, Any], rows: Sequence[Row]
) -> Iterator[Row]:
    """A `base.RowMapper` without Ray."""
    make: Callable[..., Callable[[Row], Row]] = worker
    return map(make(**arguments), rows)


def row(name: str, episodes: Sequence[Trajectory]) -> str:
    """One line of the table; steps are those of won games."""
    won = [episode for episode in episodes if episode.success]
    rate = wilson_interval(len(won), len(episodes), 0.95)
    steps = sum(len(episode.steps) for episode in won) / max(len(won), 1)
    reward = sum(episode.reward for episode in episodes) / max(len(episodes), 1)
    share, interval = f"{100 * rate.estimate:.1f}", f"{100 * rate.low:.1f} - {100 * rate.high:.1f}"
    counts = (len(episodes), len(won), share, interval)
    return ROW.format(name, *counts, f"{steps:.1f}", f"{reward:.4f}")


def sample(tasks: Sequence[Task], num_tasks: int | None, seed: int) -> Sequence[Task]:
    """So many of the tasks, drawn at random; None: all."""
    if num_tasks is None or num_tasks >= len(tasks):
        return tasks
    return random.Random(seed).sample(tasks, num_tasks)


def expert_table(config: RunConfig, tasks: Sequence[Task], max_steps: int) -> Iterator[str]:
    """Play the tasks; the lines of a table with one row per task type and one of all."""
    equipped = task_source(config.env.name).equip(config, list(tasks), one_by_one)
    by_type = asyncio.run(play_all(config, equipped, max_steps))
    heads = ("task type", "tasks", "won", "%", "95 % interval", "mean steps", "mean reward")
    yield ROW.format(*heads)
    for name in sorted(by_type):
        yield row(name, by_type[name])
    yield row("all", [episode for episodes in by_type.values() for episode in episodes])
