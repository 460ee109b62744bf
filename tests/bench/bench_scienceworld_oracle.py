"""How often the oracle saves an episode in which the student goes wrong 1 to 3 times.

    python tests/bench/bench_scienceworld_oracle.py --gold gold/scienceworld --per-type 4

The student follows the expert, but at 1 to 3 random turns it does a random valid action instead:
a verb drawn evenly, then one of its actions; looks and waits are no errors and are not drawn. The
teacher corrects. Needs gold paths in the cache (jobs/gold.py); variations of the test split.
"""

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from step_ray.collection.player import HistoryPlayer
from step_ray.envs.scienceworld import tables
from step_ray.envs.scienceworld.env import ScienceworldEnv
from step_ray.envs.scienceworld.goldcache import read_gold, with_gold
from step_ray.envs.scienceworld.tasks import make_task
from step_ray.envs.scienceworld.text import is_look
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.teacher import ExpertStudent, OracleTeacher
from step_ray.types import Source, StepKind, StopReason, Task, Trajectory


class Stumbler(HistoryPlayer):
    """Plays like the expert, but does something else at some of its turns."""

    def __init__(self, task: Task, env: ScienceworldEnv, num_steps: int, seed: int) -> None:
        self.name = "stumbler"
        self._expert = ExpertStudent(task)
        self._env = env
        self._rng = random.Random(f"{task.task_id}/{seed}")
        num_errors = self._rng.randint(1, 3)
        self._wrong = set(self._rng.sample(range(num_steps), min(num_errors, num_steps)))
        self._turn = 0
        self.done: list[str] = []

    def play(self, first: str, history: Sequence[tuple[str, str]], draw: str) -> tuple[str, str]:
        thought, action = self._expert.play(first, history, draw)
        if self._turn in self._wrong and not action.isdecimal():
            action = self._something_else(action)
            self.done.append(action)
        self._turn += 1
        return thought, action

    def _something_else(self, right: str) -> str:
        by_verb: dict[str, list[str]] = {}
        for action in self._env.engine_call("getValidActionObjectCombinations"):
            if action not in (right, "help", "objects") and not is_look(action):
                by_verb.setdefault(action.split()[0], []).append(str(action))
        for verb in ("wait", "wait1"):
            by_verb.pop(verb, None)
        return self._rng.choice(sorted(by_verb[self._rng.choice(sorted(by_verb))]))


async def stumble(task: Task, num_steps: int, seed: int) -> tuple[Trajectory, list[str]]:
    """One episode and the wrong actions in it."""
    env = ScienceworldEnv()
    student = Stumbler(task, env, num_steps, seed)
    settings = EpisodeSettings(
        prompt="scienceworld_v1",
        max_steps=2 * num_steps + 40,
        max_corrections=100,
        show_admissible=False,
    )
    try:
        episode = await run_episode(
            task,
            env,
            student,
            settings=settings,
            source=Source.SELF_REFLECTED,
            teacher=OracleTeacher("scienceworld"),
            seed=seed,
        )
    finally:
        env.close()
    return episode, student.done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gold", type=Path, required=True)
    parser.add_argument("--per-type", type=int, default=4)
    parser.add_argument("--types", nargs="*", default=list(tables.TASK_TYPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show the episodes that failed")
    args = parser.parse_args()
    gold = read_gold(args.gold, "easy", ScienceworldEnv().engine)
    totals: Counter[str] = Counter()
    for name in args.types:
        there = [v for v in tables.variations(name, "test") if (name, v) in gold]
        counts: Counter[str] = Counter()
        for number in range(args.per_type if there else 0):
            variation = there[number % len(there)]
            path = gold[name, variation]
            task = with_gold(make_task(name, variation, "test"), path)
            seed = args.seed + number // len(there)
            episode, wrong = asyncio.run(stumble(task, len(path.actions), seed))
            counts["all"] += 1
            counts["won"] += episode.success
            lost = episode.stop_reason is StopReason.ENV_DONE and wrong[-1].startswith("focus")
            counts["wrong focus"] += lost
            counts["corrections"] += sum(s.kind is StepKind.CORRECTION for s in episode.steps)
            if args.verbose and not episode.success:
                print(f"  {task.task_id} {episode.stop_reason} {episode.best_reward} {wrong}")
                for step in episode.steps:
                    print(f"    {step.kind} {step.action} | {(step.observation or '')[:60]!r}")
        totals += counts
        print(row(name, counts), flush=True)
    print(row("all", totals))


def row(name: str, counts: Counter[str]) -> str:
    """One line of the table."""
    mended = counts["all"] - counts["wrong focus"]
    share = f"{100 * counts['won'] / mended:4.0f} %" if mended else "   - "
    return (
        f"{name:50} {counts['won']:3} of {counts['all']:3} at 100,"
        f" {counts['wrong focus']:2} ended by a wrong focus, {share} of the others,"
        f" {counts['corrections']:3} corrections"
    )


if __name__ == "__main__":
    main()
