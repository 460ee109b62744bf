"""Win rate and mean steps of the text-only ALFWorld expert, per task type.

    python jobs/measure_expert.py $ALFWORLD_DATA/json_2.1.1/valid_seen

The expert reads what an agent reads, and nothing else of the game.
"""

import argparse
import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from step_ray.envs import make_env
from step_ray.envs.alfworld.parity import find_games
from step_ray.play import alfworld_task
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.stats import wilson_interval
from step_ray.teacher import ExpertStudent
from step_ray.types import Source, Trajectory

ROW = "{:32}{:>7}{:>7}{:>8}{:>16}{:>12}"


async def play_all(games: Sequence[Path], max_steps: int) -> dict[str, list[Trajectory]]:
    """One episode per game, by task type."""
    env = make_env("alfworld")
    settings = EpisodeSettings(prompt="alfworld_v1", max_steps=max_steps)
    episodes: dict[str, list[Trajectory]] = {}
    for game in games:
        task = alfworld_task(str(game), game.parent, seed=0)
        episode = await run_episode(
            task, env, ExpertStudent(task), settings=settings, source=Source.EXPERT
        )
        episodes.setdefault(game.parts[-3].partition("-")[0], []).append(episode)
    return episodes


def row(name: str, episodes: Sequence[Trajectory]) -> str:
    """One line of the table; steps are those of won games."""
    won = [episode for episode in episodes if episode.success]
    rate = wilson_interval(len(won), len(episodes), 0.95)
    steps = sum(len(episode.steps) for episode in won) / max(len(won), 1)
    share, interval = f"{100 * rate.estimate:.1f}", f"{100 * rate.low:.1f} - {100 * rate.high:.1f}"
    return ROW.format(name, len(episodes), len(won), share, interval, f"{steps:.1f}")


def main() -> None:
    """Play and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-games", type=int, help="random games of the folder; default: all")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="which games")
    args = parser.parse_args()
    games = find_games(args.folder)
    if args.num_games and args.num_games < len(games):
        games = random.Random(args.seed).sample(games, args.num_games)
    by_type = asyncio.run(play_all(games, args.max_steps))
    print(ROW.format("task type", "games", "won", "%", "95 % interval", "mean steps"))
    for name in sorted(by_type):
        print(row(name, by_type[name]))
    print(row("all", [episode for episodes in by_type.values() for episode in episodes]))


if __name__ == "__main__":
    main()
