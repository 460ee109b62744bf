"""Native against official ALFWorld engine: the same games and commands, CPU time in one process.

    python tests/bench/bench_alfworld_engine.py $ALFWORLD_DATA/json_2.1.1/valid_seen

The official side already remembers its translations; `start, first` is a game not seen before.
Needs the extra `alfworld`.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from step_ray.envs.alfworld import parity
from step_ray.envs.alfworld.engine import NativeEngine, load_game
from step_ray.envs.alfworld.official import OfficialEngine

Timings = dict[str, float]


def native(path: Path) -> NativeEngine:
    return NativeEngine(load_game(path))


def plan_commands(path: Path, num_steps: int, seed: int) -> list[str]:
    """Commands of a random walk, drawn once so that both sides play the same."""
    engine, rng = native(path), random.Random(seed)
    engine.reset()
    commands = []
    for _ in range(num_steps):
        commands.append(parity.random_command(engine.admissible(), rng))
        engine.step(commands[-1])
    return commands


def measure(make: Callable[[Path], parity.Engine], plans: dict[Path, list[str]]) -> Timings:
    """Milliseconds of CPU per start and per step with its list of admissible commands."""
    spent = dict.fromkeys(("start, first", "start, again", "step + admissible"), 0.0)
    for path, commands in plans.items():
        begun = time.process_time()
        engine = make(path)
        engine.reset()
        started = time.process_time()
        engine.reset()
        restarted = time.process_time()
        for command in commands:
            engine.step(command)
            engine.admissible()
        spent["start, first"] += (started - begun) / len(plans)
        spent["start, again"] += (restarted - started) / len(plans)
        spent["step + admissible"] += (time.process_time() - restarted) / len(commands) / len(plans)
    return {what: 1e3 * seconds for what, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-games", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    games = random.Random(0).sample(parity.find_games(args.folder), args.num_games)
    plans = {path: plan_commands(path, args.steps, seed) for seed, path in enumerate(games)}
    OfficialEngine(games[0])  # its imports take a second and are not what is measured
    ours, theirs = measure(native, plans), measure(OfficialEngine, plans)
    print(f"{len(plans)} games, {args.steps} steps each; CPU ms")
    print(f"{'':20}{'native':>10}{'official':>10}{'ratio':>8}")
    for what in ours:
        ratio = theirs[what] / ours[what]
        print(f"{what:20}{ours[what]:10.3f}{theirs[what]:10.1f}{ratio:8.0f}")


if __name__ == "__main__":
    main()
