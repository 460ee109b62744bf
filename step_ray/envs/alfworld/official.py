"""The official ALFWorld engine (textworld + alfworld) behind the native engine's interface.

Needs the extra `alfworld`; loaded on first use. The engine is built on global state (translator
options, parsers, sys.argv, sys.stdout), so a process has one, used by one thread, and it plays one
game at a time: an engine object that lost its turn to another must `reset` before it steps again.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_ray.envs.alfworld.engine import StepOutcome
from step_ray.errors import ConfigError, DataError, EnvError, boundary

_CACHED_TRANSLATIONS = 16


class OfficialEngine:
    """An episode of one game in the process's official engine; call `reset` first.

    Args:
        path: the `game.tw-pddl` file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        if not Path(path).is_file():
            raise DataError(f"{path}: no such game file")
        self._shared = _shared_engine()
        self._state: Any = None

    def reset(self) -> str:
        """Start over and return the first observation."""
        with boundary(EnvError, f"{self._path}: reset"):
            self._state = self._shared.start(self, self._path)
        return str(self._state.feedback)

    def step(self, command: str) -> StepOutcome:
        """Carry out one command."""
        self._require_turn()
        with boundary(EnvError, f"{self._path}: step {command!r}"):
            self._state, _, done = self._shared.env.step(command)
        return StepOutcome(str(self._state.feedback), bool(self._state["won"]), bool(done))

    def admissible(self) -> list[str]:
        """Commands that would do something now, in alphabetical order."""
        self._require_turn()
        return list(self._state["admissible_commands"])

    def _require_turn(self) -> None:
        if self._shared.player is not self:
            raise EnvError(f"{self._path}: reset it first; the engine is playing another game")


class _SharedEngine:
    """The one environment of a process; a new one per episode would leak a copied library."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.player: OfficialEngine | None = None
        self._loaded = ""

    def start(self, player: OfficialEngine, path: str) -> Any:
        self.player = player
        if path != self._loaded:
            self._loaded = ""
            self.env.load(path)
            self._loaded = path
        return self.env.reset()


@functools.cache
def _shared_engine() -> _SharedEngine:
    try:
        import fast_downward
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs import PddlEnv
    except ImportError as exc:
        raise ConfigError(
            f"env.engine: textworld: {exc}; pip install 'step-ray[alfworld]' or use native"
        ) from None
    fast_downward.pddl2sas = _translate_once(fast_downward.pddl2sas)
    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    pddl_env = PddlEnv(infos)
    pddl_env.downward_lib.load_sas_replan = lambda sas: None
    return _SharedEngine(AlfredInfos(AlfredDemangler(pddl_env, shuffle=False)))


def _translate_once(translate: Callable[..., tuple[Any, str]]) -> Callable[..., tuple[Any, str]]:
    """Remember translations, and leave out the one that only re-planning would need.

    The stock engine translates the same text four times per episode, half a second each.
    """

    @functools.lru_cache(maxsize=_CACHED_TRANSLATIONS)
    def translated(domain: str, problem: str) -> tuple[Any, str]:
        argv = sys.argv
        try:
            return translate(domain, problem)
        finally:
            sys.argv = argv  # the translator replaces it

    def cached(
        domain: str, problem: str, verbose: bool = False, optimize: bool = False
    ) -> tuple[Any, str]:
        return (None, "") if optimize else translated(domain, problem)

    return cached
