"""WebShop's tasks: goals of the official files or of a generated shop, dealt into splits.

Takes a `RunConfig`, converts the catalogue once, gives tasks whose params name it and a goal. See
`base.TaskSource`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from step_ray.config import RunConfig, expand_path
from step_ray.envs.base import RowMapper
from step_ray.envs.webshop.catalogue import build_catalogue, open_catalogue
from step_ray.envs.webshop.generator import (
    ANNOTATIONS_FILE,
    HUMAN_FILE,
    PRODUCTS_FILE,
    generate_shop,
)
from step_ray.envs.webshop.goals import list_goals, make_task
from step_ray.envs.webshop.tables import SPLITS
from step_ray.errors import ConfigError, DataError
from step_ray.types import Task

GENERATED_TEST_SHARE = 5
"""Of a generated shop, the goals of every fifth product are for testing."""
_NAMES = {
    "products": ("items_shuffle*.json", "env.webshop.products"),
    "annotations": ("items_ins_v2*.json", "env.webshop.annotations"),
}


def check(config: RunConfig) -> None:
    """The files and the splits are there, or will be generated."""
    section = config.env.webshop
    for split in config.tasks.eval_splits:
        if split not in _held_out_splits(config):
            raise ConfigError(
                f"tasks.eval_split: {split!r} is no held-out split here;"
                f" use one of {_held_out_splits(config)}"
            )
    if section.source == "official":
        _official_files(config)
        if section.splits == "agentgym":
            _agentgym_ids(config, "test")


def _held_out_splits(config: RunConfig) -> tuple[str, ...]:
    section = config.env.webshop
    official = section.source == "official" and section.splits == "official"
    return ("test", "dev") if official else ("test",)


def _official_files(config: RunConfig) -> tuple[Path, Path, Path]:
    section = config.env.webshop
    folder = expand_path("env.webshop.data_dir", section.data_dir)
    found = [
        _only(folder, getattr(section, name) or pattern, key)
        for name, (pattern, key) in _NAMES.items()
    ]
    human = folder / HUMAN_FILE
    if not human.is_file():
        raise ConfigError(f"env.webshop.data_dir: {str(human)!r} is missing; add it")
    return found[0], found[1], human


def _only(folder: Path, pattern: str, key: str) -> Path:
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise ConfigError(
            f"env.webshop.data_dir: {str(folder)!r} holds no {pattern}; get the files with the"
            " set-up script of princeton-nlp/WebShop"
        )
    if len(paths) > 1:
        names = [path.name for path in paths]
        raise ConfigError(f"{key}: {str(folder)!r} holds {names}; name the one to use")
    return paths[0]


def catalogue_folder(config: RunConfig) -> Path:
    """The converted catalogue of a run; it is made where it is missing.

    Raises:
        ConfigError: the official files are missing.
        DataError: one of them cannot be used.
    """
    section = config.env.webshop
    if section.source == "official":
        cache = expand_path("env.webshop.cache_dir", section.cache_dir)
        return build_catalogue(cache, *_official_files(config), num_products=section.num_products)
    folder = config.run_dir / "games" / "webshop"
    generate_shop(folder, section.generator.num_products, section.generator.seed)
    return build_catalogue(
        folder / "catalogue",
        folder / PRODUCTS_FILE,
        folder / ANNOTATIONS_FILE,
        folder / HUMAN_FILE,
    )


def prepare(config: RunConfig) -> None:
    """Generate the shop, if so configured, and convert the catalogue."""
    catalogue_folder(config)


def training_tasks(config: RunConfig) -> list[Task]:
    """The goals of the training split, by id."""
    return list_tasks(config, "train")


def held_out_tasks(config: RunConfig, split: str) -> list[Task]:
    """The goals of a split, by id."""
    return list_tasks(config, split)


def list_tasks(config: RunConfig, split: str) -> list[Task]:
    """The goals of a split that have one of the task types."""
    section = config.env.webshop
    catalogue = open_catalogue(catalogue_folder(config))
    goals = list_goals(catalogue, section.goals, section.price_seed)
    wanted = set(config.env.task_types)
    chosen = [goals[n] for n in _positions(config, split, [goal.asin for goal in goals])]
    tasks = [
        make_task(goal, catalogue, split, section.price_seed)
        for goal in chosen
        if goal.category in wanted
    ]
    return sorted(tasks, key=lambda task: task.task_id)


def _positions(config: RunConfig, split: str, asins: Sequence[str]) -> list[int]:
    """Positions of a split's goals in the official order."""
    section = config.env.webshop
    if section.source == "generated":
        products = {asin: place for place, asin in enumerate(sorted(set(asins)))}
        held_out = split != "train"
        return [
            position
            for position, asin in enumerate(asins)
            if (products[asin] % GENERATED_TEST_SHARE == 0) == held_out
        ]
    if section.splits == "agentgym":
        return _in_range(_agentgym_ids(config, split), len(asins))
    start, end = SPLITS[split]
    return list(range(len(asins)))[start:end]


def _in_range(positions: list[int], number: int) -> list[int]:
    beyond = next((position for position in positions if position >= number), None)
    if beyond is not None:
        raise DataError(
            f"env.webshop.split_dir: webshop_{beyond} is beyond the {number} goals of this"
            " catalogue; AgentGym's lists are for the 1,000 products and goals: synthetic"
        )
    return positions


def _agentgym_ids(config: RunConfig, split: str) -> list[int]:
    """The goals of one of AgentGym's lists `*webshop_<split>.json`, by position."""
    folder = expand_path("env.webshop.split_dir", config.env.webshop.split_dir)
    paths = sorted(folder.glob(f"*webshop_{split}.json"))
    if not paths:
        raise ConfigError(
            f"env.webshop.split_dir: {str(folder)!r} holds no *webshop_{split}.json; get AgentGym's"
            " item lists or set env.webshop.splits to 'official'"
        )
    try:
        items = json.loads(paths[0].read_text(encoding="utf-8"))
        return [int(item["item_id"].removeprefix("webshop_")) for item in items]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DataError(f"{paths[0]}: no list of item ids ({type(exc).__name__}: {exc})") from exc


def fingerprints(tasks: Sequence[Task]) -> list[str]:
    """What each goal asks for, its price limit apart: product, instruction and options."""
    return [task.params["content"] for task in tasks]


def equip(config: RunConfig, tasks: Sequence[Task], mapper: RowMapper) -> list[Task]:
    """The tasks as they are: the expert reads the goal in the params."""
    del config, mapper
    return list(tasks)
