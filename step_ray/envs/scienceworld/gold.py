"""Gold paths: made by the engine, cut at the full score, freed of refused steps, and replayed.

Takes a task type and a variation, gives a row of `goldcache.GOLD_SCHEMA`. Making one costs the
engine seconds to minutes; it is done once, by a job, never in a rollout (see goldcache.py).
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from step_ray.envs.base import EnvStep
from step_ray.envs.scienceworld.env import FULL_SCORE, ScienceworldEnv, check_range
from step_ray.envs.scienceworld.jvm import shared_pool
from step_ray.envs.scienceworld.text import choices, is_look
from step_ray.errors import EnvError
from step_ray.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldPath:
    """A gold path and how it was made."""

    task: str
    """Task type."""
    variation: int
    simplification: str
    engine: str
    """Engine and version: another version may need another path."""
    actions: tuple[str, ...] = ()
    observations: tuple[str, ...] = ()
    """Answers to the actions in a fresh world; empty for looks, which the expert never reads."""
    subgoals: tuple[str, ...] = ()
    """Per action, the engine's sub-goal that it works towards."""
    score: int = 0
    """What replaying it in a fresh world has reached."""
    num_raw_actions: int = 0
    """Actions before the path was cut and freed of refused steps."""
    seconds: float = 0.0
    """Time to make the path, replays included."""
    error: str = ""


class GoldMaker:
    """Makes gold paths, one after another; rows in, rows out, for `base.RowMapper`."""

    def __init__(self, simplification: str, heap_mb: int) -> None:
        self._simplification = simplification
        self._pool = shared_pool(heap_mb)
        self._env = ScienceworldEnv(simplification, heap_mb)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The gold path of `row["task"]`, `row["variation"]` as JSON; it may hold an error."""
        started = time.monotonic()
        path = GoldPath(
            task=row["task"],
            variation=int(row["variation"]),
            simplification=self._simplification,
            engine=self._env.engine,
        )
        try:
            path = self._make(path)
        except EnvError as exc:
            path = replace(path, error=str(exc))
        done = replace(path, seconds=time.monotonic() - started)
        return {"record": json.dumps(asdict(done), ensure_ascii=False)}

    def _make(self, path: GoldPath) -> GoldPath:
        raw = self._generate(path)
        whole = self._replay(path, raw)
        # refused steps take time too: where the path needs that, it stays as it is
        short = self._replay(path, _useful(whole))
        best = short if short.score == FULL_SCORE else whole
        return replace(
            path,
            actions=tuple(best.actions),
            observations=tuple(
                "" if is_look(action) else step.observation
                for action, step in zip(best.actions, best.steps, strict=True)
            ),
            subgoals=tuple(_towards(best.reached)),
            score=best.score,
            num_raw_actions=len(raw),
        )

    def _generate(self, path: GoldPath) -> list[str]:
        world = self._pool.lend()
        try:
            check_range(world, path.task, path.variation)
            world.call("load", path.task, path.variation, path.simplification, True)
            return [str(action) for action in world.call("getGoldActionSequence")]
        finally:
            world.give_back()

    def _replay(self, path: GoldPath, actions: Sequence[str]) -> "_Replay":
        params = {"task": path.task, "variation": str(path.variation)}
        name = f"scienceworld/{path.task}/{path.variation}"
        replay = _Replay(self._env, Task(task_id=name, env="", split="", goal="", params=params))
        try:
            for action in actions:
                if replay.do(action):
                    break
        finally:
            self._env.close()
        return replay


class _Replay:
    """A path played in a fresh world."""

    def __init__(self, env: ScienceworldEnv, task: Task) -> None:
        env.reset(task)
        self._env = env
        self._open: list[str] = []
        self.actions: list[str] = []
        self.steps: list[EnvStep] = []
        self.reached: list[list[str]] = []
        """Per step, the sub-goals that it has reached."""
        self._done = _subgoals(env.engine_call)
        self.score = 0

    def do(self, action: str) -> bool:
        """One step; a number after a question becomes its words. True when the episode is over."""
        if self._open and action.isdecimal():
            action = self._open[min(int(action), len(self._open) - 1)]
        step = self._env.step(action)
        self._open = choices(step.observation)
        now = _subgoals(self._env.engine_call)
        self.reached.append([text for key, text in now.items() if key not in self._done])
        self._done |= now
        self.actions.append(action)
        self.steps.append(step)
        self.score = round(FULL_SCORE * sum(s.reward for s in self.steps))
        return step.done


def _useful(replay: _Replay) -> list[str]:
    """The actions that were carried out, and the questions that were answered."""
    pairs = list(zip(replay.actions, replay.steps, strict=True))
    following = [*replay.actions[1:], ""]
    return [
        action
        for (action, step), after in zip(pairs, following, strict=True)
        if not step.noop and (not (offers := choices(step.observation)) or after in offers)
    ]


def _subgoals(call: Callable[..., Any]) -> dict[tuple[str, str], str]:
    """The sub-goals that are reached now: (section, number) -> wording."""
    section, reached = "", {}
    for line in str(call("getGoalProgressStr")).splitlines():
        cells = line.split("\t")
        if len(cells) < 4:
            section = line if line.endswith("Subgoals:") else section
        elif cells[1] == "true":
            reached[section, cells[0]] = cells[3].strip()
    return reached


def _towards(reached: Sequence[Sequence[str]]) -> list[str]:
    """Per step, the next sub-goal that will be reached by it or after it."""
    ahead, goals = "", []
    for texts in reversed(reached):
        ahead = next((text for text in texts if text), ahead)
        goals.append(ahead)
    return goals[::-1]
