"""ALFWorld's tasks: game files, official or generated in the run's folder.

Takes a `RunConfig`, gives tasks whose params name a game file; plays none. See `base.TaskSource`.
"""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from step_ray.config import RunConfig, expand_path
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.pddl_text import game_fingerprint
from step_ray.envs.base import RowMapper
from step_ray.errors import ConfigError, DataError
from step_ray.storage.places import mirror, place_of
from step_ray.types import Task

LAYOUT = "json_2.1.1"
GAME_FILE = "game.tw-pddl"
LEFT_OUT = ("movable", "Sliced")
"""ALFWorld's own filter: paths with these words are no text games."""
UNSOLVABLE = re.compile(rb'"solvable":\s*false')
"""The other part of that filter; searched in the raw file, since parsing 3,553 games takes long."""


def games_dir(config: RunConfig) -> Path:
    """Folder that holds `json_2.1.1`.

    Raises:
        ConfigError: `env.data_dir` is unset or holds no games.
    """
    if config.env.source == "generated":
        return config.run_dir / "games"
    folder = expand_path("env.data_dir", config.env.data_dir)
    if not (folder / LAYOUT).is_dir():
        raise ConfigError(
            f"env.data_dir: {str(folder)!r} holds no {LAYOUT}; run alfworld-download or mend it"
        )
    return folder


def check(config: RunConfig) -> None:
    """The games are there, or will be generated."""
    games_dir(config)
    if config.env.source == "generated":
        _number(config)


def prepare(config: RunConfig) -> None:
    """Write the generated games of the run; files that are already there are left alone."""
    if config.env.source != "generated":
        return
    lists = {"train": config.tasks.num_expert + config.tasks.num_collect}
    for split in config.tasks.eval_splits:
        lists[split] = _number(config)
    for split, num_games in lists.items():
        spec = GeneratorSpec(
            seed=config.env.generator.seed,
            split=split,
            num_games=num_games,
            task_types=config.env.task_types,
            size=config.env.generator.size,
        )
        generate_games(spec, games_dir(config))


def _number(config: RunConfig) -> int:
    """Games of each held-out split to generate."""
    if config.tasks.num_eval == "all":
        raise ConfigError(
            "tasks.num_eval: 'all' is for games that are there already; give a number"
        )
    return config.tasks.num_eval


def training_tasks(config: RunConfig) -> list[Task]:
    """The games of the training split, by id."""
    return list_tasks(config, "train")


def held_out_tasks(config: RunConfig, split: str) -> list[Task]:
    """The games of a split, by id."""
    return list_tasks(config, split)


def list_tasks(config: RunConfig, split: str) -> list[Task]:
    """All playable games of a split, by id: those that ALFWorld itself would play.

    Raises:
        ConfigError: the split's folder is missing.
    """
    folder = games_dir(config) / LAYOUT / split
    if not folder.is_dir():
        raise ConfigError(f"tasks: the folder {str(folder)!r} of split {split!r} is missing")
    paths = sorted(folder.glob(f"*/*/{GAME_FILE}"))
    names = [str(path.relative_to(folder)) for path in paths]
    tasks = [
        _task(path, split)
        for path, name in zip(paths, names, strict=True)
        if not any(word in name for word in LEFT_OUT)
    ]
    wanted = set(config.env.task_types)
    tasks = [task for task in tasks if task.task_type in wanted]
    with ThreadPoolExecutor(8) as pool:
        solvable = pool.map(_is_solvable, tasks)
        return [task for task, is_solvable in zip(tasks, solvable, strict=True) if is_solvable]


def _is_solvable(task: Task) -> bool:
    return not UNSOLVABLE.search(mirror(task.params["game"]).read_bytes())


def _task(path: Path, split: str) -> Task:
    game, trial = path.parts[-3], path.parts[-2]
    return Task(
        task_id=f"alfworld/{split}/{game}/{trial}",
        env="alfworld",
        split=split,
        goal="",
        task_type=game.partition("-")[0],
        params={"game": place_of(path)},
    )


def fingerprints(tasks: Sequence[Task]) -> list[str]:
    """What each game contains, object ids apart.

    Raises:
        DataError: a game cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_fingerprint, tasks))


def _fingerprint(task: Task) -> str:
    path = mirror(task.params["game"])
    try:
        problem = json.loads(path.read_text(encoding="utf-8"))["pddl_problem"]
    except (OSError, ValueError, KeyError) as exc:
        raise DataError(f"game {str(path)!r} cannot be read; remove or replace it") from exc
    return game_fingerprint(problem)


def equip(config: RunConfig, tasks: Sequence[Task], mapper: RowMapper) -> list[Task]:
    """The tasks as they are: the expert knows only what the agent has read."""
    del config, mapper
    return list(tasks)
