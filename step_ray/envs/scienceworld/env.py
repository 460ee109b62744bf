"""ScienceWorld as a `TextEnv`: one episode in a world lent from the process's pool.

Takes tasks whose params are `task` and `variation`; gives the engine's texts. Rewards are shares of
the full score 100: they add up to the final score, their highest running sum is the best score. The
limit of turns is the episode loop's; the engine's own count of moves is not used, because looks are
free in it and one wait is eleven.
"""

from typing import Any

from step_ray.envs.base import EnvStep
from step_ray.envs.scienceworld import tables
from step_ray.envs.scienceworld.jvm import World, engine_version, shared_pool
from step_ray.envs.scienceworld.text import choices, is_noop, question
from step_ray.errors import EnvError
from step_ray.types import Task

FULL_SCORE = 100
WORDS = ("help", "objects")
"""Inputs that only concern the parser; no action of the game."""


class ScienceworldEnv:
    """One ScienceWorld episode; success is the full score."""

    def __init__(
        self, simplification: str = "easy", heap_mb: int = 512, list_actions: bool = False
    ) -> None:
        self.engine = f"scienceworld {engine_version()}"
        self._simplification = simplification
        self._pool = shared_pool(heap_mb)
        self._list_actions = list_actions
        self._world: World | None = None
        self._score = 0
        self._offers: list[str] = []

    def reset(self, task: Task) -> str:
        """Load the task; gives its description and the first room.

        Raises:
            EnvError: no such task or variation, or Java fails.
        """
        name, variation = which(task)
        needless = "noElectricalAction" in self._simplification.split(",")
        if needless and name in tables.ELECTRICAL:
            raise EnvError(
                f"{task.task_id}: env.scienceworld.simplification 'noElectricalAction' takes away"
                " what this task needs; use 'easy'"
            )
        self.close()
        self._world = self._pool.lend()
        check_range(self._world, name, variation)
        self._world.call("load", name, variation, self._simplification, False)
        self._score, self._offers = 0, []
        goal = str(self._world.call("getTaskDescription")).strip()
        return f"{goal}\n\n{str(self._world.call('freeActionLook')).strip()}"

    def step(self, action: str) -> EnvStep:
        """Carry out one action."""
        world = self._running()
        observation = str(world.call("step", self._answer(action))).strip()
        self._offers = choices(observation)
        if self._offers:
            observation = question(sorted(self._offers))
        score = round(FULL_SCORE * float(world.call("getScore")))
        done = score < 0 or bool(world.call("getCompleted"))
        score = max(score, 0)  # -100 says: the focus was wrong, the task is lost
        reward, self._score = (score - self._score) / FULL_SCORE, score
        return EnvStep(
            observation=observation,
            reward=reward,
            done=done,
            success=done and score == FULL_SCORE,
            noop=is_noop(observation),
        )

    def _answer(self, action: str) -> str:
        """The input for an action: its number where the engine has asked which of several is meant.

        The words of an offer are an answer too. Anything else would be swallowed by the open
        question, so that is cancelled first.
        """
        offers = sorted(self._offers)
        if action.isdecimal() and int(action) < len(offers):
            action = offers[int(action)]
        if action in offers:
            return str(self._offers.index(action))
        if not offers:
            return action
        self._running().call("step", "")
        return action

    def admissible_actions(self) -> list[str]:
        """The numbers of an open question; else all valid actions where `list_actions` asks so.

        The full list takes the engine ten times as long as a step and can have 3,000 entries.
        """
        if self._offers:
            return [str(number) for number in range(len(self._offers))]
        if not self._list_actions:
            return []
        listed = self._running().call("getValidActionObjectCombinations")
        return [str(action) for action in listed if action not in WORDS]

    def engine_call(self, method: str) -> Any:
        """What the engine knows of the running task beyond the `TextEnv`, e.g. its sub-goals."""
        return self._running().call(method)

    def _running(self) -> World:
        if self._world is None:
            raise EnvError("scienceworld: called before reset or after close")
        return self._world

    def close(self) -> None:
        """Give the world back to the pool."""
        if self._world is not None:
            self._world.give_back()
            self._world = None


def which(task: Task) -> tuple[str, int]:
    """Task type and variation of a task.

    Raises:
        EnvError: the params name none.
    """
    name, variation = task.params.get("task", ""), task.params.get("variation", "")
    if name not in tables.SPLIT_SIZES:
        raise EnvError(f"{task.task_id}: {name!r} is no task type of ScienceWorld")
    if not variation.isdecimal():
        raise EnvError(f"{task.task_id}: the variation {variation!r} is no number")
    return name, int(variation)


def check_range(world: World, name: str, variation: int) -> None:
    """Refuse an impossible variation; the engine would load it without a word.

    Raises:
        EnvError: there is no such variation.
    """
    number = int(world.call("getTaskMaxVariations", name))
    if not 0 <= variation < number:
        raise EnvError(
            f"scienceworld/{name}/{variation}: {name!r} has the variations 0 to {number - 1},"
            f" not {variation}"
        )
