"""`step-ray play`: a person plays an environment in the terminal.

Takes a task and lines of text, gives lines of text. Undo plays the kept actions again from the
start, so it works with every environment whose episodes repeat. It stores nothing.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from step_ray.config import parse_config
from step_ray.envs.base import EnvStep, Expert, TextEnv
from step_ray.errors import ConfigError
from step_ray.types import Task

HELP = "?: valid actions, undo: take the last action back, hint: the expert's move, quit: leave"


@dataclass(slots=True)
class Session:
    """One game in progress.

    Args:
        env: the environment; one session owns it.
        task: what to play.
        expert: gives hints; None: there are none.
    """

    env: TextEnv
    task: Task
    expert: Expert | None = None
    history: list[tuple[str, EnvStep]] = field(default_factory=list)
    first_observation: str = ""

    def start(self) -> str:
        """Load the task; the first observation, goal included."""
        self.history.clear()
        self.first_observation = self.env.reset(self.task)
        return self.first_observation

    @property
    def over(self) -> bool:
        """The last action ended the episode."""
        return bool(self.history) and self.history[-1][1].done

    def answer(self, line: str) -> str:
        """What one typed line brings: an observation, or the answer to a command of `HELP`."""
        commands: dict[str, Callable[[], str]] = {
            "": lambda: HELP,
            "?": lambda: "\n".join(self.env.admissible_actions()) or "this environment lists none",
            "undo": self._undo,
            "hint": self._hint,
        }
        action = line.strip()
        return commands.get(action, lambda: self._act(action))()

    def _act(self, action: str) -> str:
        step = self.env.step(action)
        self.history.append((action, step))
        return step.observation

    def _undo(self) -> str:
        if not self.history:
            return "There is nothing to undo."
        kept = [action for action, _ in self.history[:-1]]
        last = self.start()
        for action in kept:
            last = self._act(action)
        return f"Back to step {len(kept)}.\n{last}"

    def _hint(self) -> str:
        if self.expert is None:
            return "There is no expert for this environment."
        pairs = [(action, step.observation) for action, step in self.history]
        thought, action = self.expert.propose(self.first_observation, pairs)
        return f"{thought} -> {action}"

    def verdict(self) -> str:
        """How the game stands, in one line."""
        won = any(step.success for _, step in self.history)
        reward = sum(step.reward for _, step in self.history)
        return f"{'Won' if won else 'Not won'} after {len(self.history)} actions, reward {reward:g}"


def play(session: Session, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answer line by line until the game is over, `quit`, or the lines end."""
    write(session.start())
    write(HELP)
    for line in lines:
        if line.strip() == "quit":
            break
        write(session.answer(line))
        if session.over:
            break
    write(session.verdict())


def alfworld_task(game: str, folder: Path, seed: int) -> Task:
    """A game to play: the one at a path, or without a path a new small one made in `folder`.

    Raises:
        ConfigError: the path is no game.
    """
    from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games

    if not game:
        spec = GeneratorSpec(seed=seed, split="train", num_games=1 + seed % 6)
        path = generate_games(spec, folder)[-1]  # game i is of the i-th of six types
    else:
        path = Path(game)
        path = path / "game.tw-pddl" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"game: {game!r} is no game.tw-pddl and holds none; give another path")
    return Task(
        task_id=f"alfworld/{path.parent.name}",
        env="alfworld",
        split="play",
        goal="",
        params={"game": str(path.resolve())},
    )


def webshop_task(data: str, folder: Path, seed: int) -> Task:
    """A goal to play: of the official files in a folder, or without one of a generated shop.

    Raises:
        ConfigError: the folder lacks the official files.
    """
    from step_ray.envs.webshop.tasks import training_tasks

    made = {"source": "generated", "generator": {"num_products": 100}}
    given = {"source": "official", "data_dir": data, "cache_dir": str(folder)}
    section = {**(given if data else made), "splits": "official"}
    env = {"name": "webshop", "webshop": section}
    tasks = training_tasks(parse_config({"name": "play", "output_dir": str(folder), "env": env}))
    return tasks[random.Random(f"play/{seed}").randrange(len(tasks))]


NEW_TASKS: dict[str, Callable[[str, Path, int], Task]] = {
    "alfworld": alfworld_task,
    "webshop": webshop_task,
}
"""Environment -> what makes a task to play from a path (or none), a folder and a seed."""


def new_task(env: str, game: str, folder: Path, seed: int) -> Task:
    """A task of an environment that can be played by hand.

    Raises:
        ConfigError: the environment cannot, or there is no game at that path.
    """
    if env not in NEW_TASKS:
        raise ConfigError(f"env: {env!r} cannot be played by hand; use one of {list(NEW_TASKS)}")
    return NEW_TASKS[env](game, folder, seed)
