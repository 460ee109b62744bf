"""ALFWorld as a `TextEnv`: one game at a time on the native or the official engine.

Takes a task whose `params["game"]` is the path of a `game.tw-pddl`; gives the engine's text without
its banner. It knows nothing of experts or prompts.
"""

from pathlib import Path
from typing import Protocol

from step_ray.envs.alfworld.belief import NOTHING_HAPPENS
from step_ray.envs.alfworld.engine import NativeEngine, StepOutcome, load_game
from step_ray.envs.base import EnvStep
from step_ray.errors import ConfigError, EnvError
from step_ray.storage.remote import fetch
from step_ray.types import Task

BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"


class Engine(Protocol):
    """What both engines offer."""

    def reset(self) -> str:
        """The first observation."""
        ...

    def step(self, command: str) -> StepOutcome:
        """Carry out one command."""
        ...

    def admissible(self) -> list[str]:
        """Commands that would be understood now."""
        ...


class AlfworldEnv:
    """One ALFWorld episode; reward 1 on winning, no step limit of its own."""

    def __init__(self, engine: str = "native") -> None:
        if engine not in ("native", "textworld"):
            raise ConfigError(f"env.engine: {engine!r} is not known; use 'native' or 'textworld'")
        self.engine = f"alfworld/{engine}"
        self._native = engine == "native"
        self._game: Engine | None = None

    def reset(self, task: Task) -> str:
        """Load the task's game.

        Raises:
            EnvError: the task names no game file.
        """
        path = fetch(task.params.get("game", ""))
        if not path.is_file():
            raise EnvError(f"{task.task_id}: the game file {str(path)!r} is missing")
        self._game = self._open(path)
        return self._game.reset().removeprefix(BANNER).strip()

    def _open(self, path: Path) -> Engine:
        if self._native:
            return NativeEngine(load_game(path))
        from step_ray.envs.alfworld.official import OfficialEngine

        return OfficialEngine(path)

    def step(self, action: str) -> EnvStep:
        """Carry out one command."""
        outcome = self._running().step(action)
        return EnvStep(
            observation=outcome.text.strip(),
            reward=1.0 if outcome.won else 0.0,
            done=outcome.done,
            success=outcome.won,
            noop=outcome.text.strip() == NOTHING_HAPPENS,
        )

    def admissible_actions(self) -> list[str]:
        """The engine's list, `help` left out: it tells nothing about the game."""
        return [command for command in self._running().admissible() if command != "help"]

    def _running(self) -> Engine:
        if self._game is None:
            raise EnvError("alfworld: step before reset")
        return self._game

    def close(self) -> None:
        """Drop the game."""
        self._game = None
