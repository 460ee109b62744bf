"""Task lists: which games are U1 (expert), U2 (collect) and evaluation.

Takes a `RunConfig`, gives `TaskLists` with stable ids, and checks that no evaluation game is in
training. It makes generated games once, in the run's folder; it plays none.
"""

import json
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from step_ray.config import RunConfig, expand_path
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.pddl_text import game_fingerprint
from step_ray.errors import ConfigError, DataError
from step_ray.store import VERSION_KEY, read_rows, write_table
from step_ray.types import SCHEMA_VERSION, Task

LAYOUT = "json_2.1.1"
GAME_FILE = "game.tw-pddl"
LEFT_OUT = ("movable", "Sliced")
"""ALFWorld's own filter: paths with these words are no text games."""
TASK_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("task_id", "env", "split", "goal", "task_type")]
    + [("params", pa.string())],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)
"""A task manifest: params as JSON, so that Ray Data moves plain columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLists:
    """The three task lists of a run; disjoint by id and, for evaluation, by content."""

    expert: tuple[Task, ...]
    """U1: golden trajectories."""
    collect: tuple[Task, ...]
    """U2: rollouts under the teacher."""
    evaluate: tuple[Task, ...]
    num_duplicates: int = 0
    """Training games left out because an evaluation game has the same content."""


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


def make_games(config: RunConfig) -> None:
    """Write the generated games of the run; files that are already there are left alone."""
    lists = {
        "train": config.tasks.num_expert + config.tasks.num_collect,
        config.tasks.eval_split: config.tasks.num_eval,
    }
    for split, num_games in lists.items():
        spec = GeneratorSpec(
            seed=config.env.generator.seed,
            split=split,
            num_games=num_games,
            task_types=config.env.task_types,
            size=config.env.generator.size,
        )
        generate_games(spec, games_dir(config))


def build_tasks(config: RunConfig) -> TaskLists:
    """Read the games and deal them out: evaluation first, then U1, then U2.

    Which games are taken depends on `seed` and the ids only.

    Raises:
        ConfigError: fewer games than asked for.
    """
    evaluation = _sample(
        list_tasks(config, config.tasks.eval_split), config.tasks.num_eval, config, "num_eval"
    )
    held_out = _fingerprints(evaluation)
    training = _shuffled(list_tasks(config, "train"), config.seed)
    wanted = config.tasks.num_expert + config.tasks.num_collect
    kept: list[Task] = []
    num_duplicates = 0
    for task, fingerprint in zip(training, _fingerprints(training), strict=True):
        if fingerprint in held_out:
            num_duplicates += 1
        elif len(kept) < wanted:
            kept.append(task)
    if len(kept) < wanted:
        raise ConfigError(
            f"tasks.num_expert + tasks.num_collect: {wanted} asked for, {len(kept)} games there;"
            " lower them"
        )
    cut = config.tasks.num_expert
    return TaskLists(
        expert=tuple(kept[:cut]),
        collect=tuple(kept[cut:]),
        evaluate=tuple(evaluation),
        num_duplicates=num_duplicates,
    )


def list_tasks(config: RunConfig, split: str) -> list[Task]:
    """All playable games of a split, by id.

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
    return [task for task in tasks if task.task_type in wanted]


def _task(path: Path, split: str) -> Task:
    game, trial = path.parts[-3], path.parts[-2]
    return Task(
        task_id=f"alfworld/{split}/{game}/{trial}",
        env="alfworld",
        split=split,
        goal="",
        task_type=game.partition("-")[0],
        params={"game": str(path.resolve())},
    )


def _sample(tasks: list[Task], count: int, config: RunConfig, key: str) -> list[Task]:
    if len(tasks) < count:
        raise ConfigError(f"tasks.{key}: {count} asked for, {len(tasks)} games there; lower it")
    return sorted(_shuffled(tasks, config.seed)[:count], key=lambda task: task.task_id)


def _shuffled(tasks: Iterable[Task], seed: int) -> list[Task]:
    ordered = sorted(tasks, key=lambda task: task.task_id)
    random.Random(f"tasks/{seed}").shuffle(ordered)
    return ordered


def _fingerprints(tasks: Sequence[Task]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_fingerprint, tasks))


def _fingerprint(task: Task) -> str:
    path = Path(task.params["game"])
    try:
        problem = json.loads(path.read_text(encoding="utf-8"))["pddl_problem"]
    except (OSError, ValueError, KeyError) as exc:
        raise DataError(f"game {str(path)!r} cannot be read; remove or replace it") from exc
    return game_fingerprint(problem)


def write_tasks(path: Path, tasks: Sequence[Task]) -> None:
    """Write a task manifest (one Parquet file)."""
    columns = {name: [getattr(task, name) for task in tasks] for name in TASK_SCHEMA.names[:-1]}
    columns["params"] = [json.dumps(dict(task.params), sort_keys=True) for task in tasks]
    write_table(path, pa.table(columns, schema=TASK_SCHEMA))


def read_tasks(path: Path) -> list[Task]:
    """Read a task manifest."""
    return [task_from_row(row) for row in read_rows(path)]


def task_from_row(row: dict[str, str]) -> Task:
    """A task from a manifest row."""
    return Task(**{**row, "params": json.loads(row["params"])})
