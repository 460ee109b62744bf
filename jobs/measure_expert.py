"""Success, mean reward and mean steps of an environment's expert, per task type.

    python jobs/measure_expert.py $ALFWORLD_DATA/json_2.1.1/valid_seen
    python jobs/measure_expert.py --config C.yaml --split train --num-tasks 500 [--set A.B=C]

A folder holds ALFWorld games; a configuration names any environment and its tasks.
"""

import argparse
import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from step_ray.config import RunConfig, load_config, parse_config
from step_ray.envs import make_env, task_source
from step_ray.envs.alfworld.parity import find_games
from step_ray.envs.base import Row
from step_ray.play import alfworld_task
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.stats import wilson_interval
from step_ray.teacher import ExpertStudent
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
    return source.training_tasks(config) if training else source.held_out_tasks(config)


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


def main() -> None:
    """Play and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="ALFWorld games")
    parser.add_argument("--config", type=Path, help="instead of a folder")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    parser.add_argument("--split", help="train, or the configuration's held-out split (default)")
    parser.add_argument("--num-tasks", type=int, help="random ones; default: all")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="which tasks")
    args = parser.parse_args()
    if (args.folder is None) == (args.config is None):
        parser.error("give a folder of ALFWorld games or --config")
    if args.folder is not None:
        config, tasks = parse_config({"name": "expert"}), game_tasks(args.folder)
    else:
        config = load_config(args.config, args.overrides)
        tasks = config_tasks(config, args.split or config.tasks.eval_split)
    if args.num_tasks and args.num_tasks < len(tasks):
        tasks = random.Random(args.seed).sample(tasks, args.num_tasks)
    tasks = task_source(config.env.name).equip(config, tasks, one_by_one)
    by_type = asyncio.run(play_all(config, tasks, args.max_steps))
    heads = ("task type", "tasks", "won", "%", "95 % interval", "mean steps", "mean reward")
    print(ROW.format(*heads))
    for name in sorted(by_type):
        print(row(name, by_type[name]))
    print(row("all", [episode for episodes in by_type.values() for episode in episodes]))


if __name__ == "__main__":
    main()
