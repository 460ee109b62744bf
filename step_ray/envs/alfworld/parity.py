"""Plays two engines side by side and reports every difference in text, commands or outcome.

Takes engines that are ready to reset; gives a `ParityReport`. Never decides which side is right.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from step_ray.envs.alfworld.engine import NativeEngine, StepOutcome, load_game
from step_ray.envs.alfworld.official import OfficialEngine

NONSENSE = ("", "   ", "LOOK", " look ", "go to", "go to nowhere 1", "take", "put a in b", "é?")
_OLD_WORDING = (
    ("move {o} to {r}", "put {o} in/on {r}"),
    ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
    ("You arrive at {r.name}.", "You arrive at {lend.name}."),
)


class Engine(Protocol):
    """What both engines offer."""

    def reset(self) -> str:
        """Start over."""
        ...

    def step(self, command: str) -> StepOutcome:
        """Carry out one command."""
        ...

    def admissible(self) -> list[str]:
        """List the commands."""
        ...


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference; `command` is '' for the start of an episode."""

    game: str
    step: int
    command: str
    what: str
    native: str
    official: str


@dataclass(slots=True)
class ParityReport:
    """Totals of a comparison."""

    games: int = 0
    episodes: int = 0
    steps: int = 0
    won: int = 0
    """Episodes that the official engine called won."""
    mismatches: list[Mismatch] = field(default_factory=list)


class Comparison:
    """One game in both engines, step for step; differences go to the report."""

    def __init__(self, name: str, native: Engine, official: Engine, report: ParityReport) -> None:
        self._name, self._native, self._official = name, native, official
        self._report = report
        self._step = 0

    def start(self) -> list[str]:
        """Reset both; return the official list of commands."""
        self._step = 0
        self._report.episodes += 1
        self._note("", "text", self._native.reset(), self._official.reset())
        return self._commands("")

    def step(self, command: str) -> tuple[list[str], bool]:
        """Carry out a command in both; return the official list of commands and whether won."""
        self._step += 1
        self._report.steps += 1
        native, official = self._native.step(command), self._official.step(command)
        self._note(command, "text", native.text, official.text)
        self._note(command, "won", str(native.won), str(official.won))
        self._note(command, "done", str(native.done), str(official.done))
        return self._commands(command), official.won

    def _commands(self, command: str) -> list[str]:
        official = self._official.admissible()
        self._note(command, "admissible", "\n".join(self._native.admissible()), "\n".join(official))
        return official

    def _note(self, command: str, what: str, native: str, official: str) -> None:
        if native != official:
            row = Mismatch(self._name, self._step, command, what, native, official)
            self._report.mismatches.append(row)


def compare_game(
    comparison: Comparison, walkthrough: Iterable[str], rng: random.Random, num_steps: int
) -> bool:
    """Play a random walk and, if there is one, the walkthrough; return whether the latter won."""
    commands = comparison.start()
    for _ in range(num_steps):
        commands, _ = comparison.step(random_command(commands, rng))
    plan, won = list(walkthrough), False
    if plan:
        comparison.start()
        for command in plan:
            _, won = comparison.step(command)
    return won


def random_command(commands: list[str], rng: random.Random) -> str:
    """Draw a verb, then a command with it, so that rare verbs get their turn; 1 in 12 is nonsense.

    A uniform draw would do little but walk.
    """
    if rng.random() < 1 / 12:
        return rng.choice((*NONSENSE, rng.choice(commands) + " 1", commands[-1][:-1]))
    verbs = sorted({command.split()[0] for command in commands} - {"help", "inventory"})
    verb = rng.choice((*verbs, "go", "inventory")) if rng.random() < 0.97 else "help"
    return rng.choice([c for c in commands if c.split()[0] == verb] or commands)


def find_games(folder: Path) -> list[Path]:
    """All game files below a folder, sorted."""
    return sorted(folder.rglob("game.tw-pddl"))


def write_old_wording(games: Iterable[Path], folder: Path) -> list[Path]:
    """Copy games with the texts that releases before 0.4 used ('put {o} in/on {r}')."""
    copies = []
    for number, game in enumerate(games):
        data = json.loads(game.read_text(encoding="utf-8"))
        for new, old in _OLD_WORDING:
            data["grammar"] = data["grammar"].replace(new, old)
        copies.append(folder / f"{number}-{game.parent.name}" / game.name)
        copies[-1].parent.mkdir(parents=True)
        copies[-1].write_text(json.dumps(data), encoding="utf-8")
    return copies


def compare_games(
    games: Iterable[Path], num_steps: int, seed: int, report: ParityReport
) -> Iterator[Path]:
    """Compare both engines on every game; yields each path when it is done.

    Args:
        games: game files.
        num_steps: length of the random walk.
        seed: the walk depends on it and on the game's name.
        report: filled in place.
    """
    for path in games:
        game = load_game(path)
        comparison = Comparison(game.game_id, NativeEngine(game), OfficialEngine(path), report)
        rng = random.Random(f"{seed} {game.game_id}")
        report.games += 1
        report.won += compare_game(comparison, game.walkthrough, rng, num_steps)
        yield path
