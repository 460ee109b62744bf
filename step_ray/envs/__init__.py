"""Text environments: a dict name -> import string, so that none loads before it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from step_ray.errors import ConfigError

if TYPE_CHECKING:  # base needs the settings, which need the tables of one environment
    from step_ray.envs.base import Expert, TaskSource, TextEnv
    from step_ray.types import Task

REGISTRY: dict[str, str] = {
    "alfworld": "step_ray.envs.alfworld.env:AlfworldEnv",
    "scienceworld": "step_ray.envs.scienceworld.env:ScienceworldEnv",
    "webshop": "step_ray.envs.webshop.env:WebshopEnv",
}
"""Environment name -> `module:class`; add a line here to add an environment."""


def make_env(name: str, **options: object) -> "TextEnv":
    """Build the environment registered as `name`.

    Raises:
        ConfigError: no environment has that name.
    """
    env: TextEnv = _registered(REGISTRY, name)(**options)
    return env


def load_env(name: str) -> None:
    """Load an environment's code, to see that its packages are there.

    Raises:
        ConfigError: no environment has that name, or it is not installed.
    """
    _registered(REGISTRY, name)


SOURCES: dict[str, str] = {
    "alfworld": "step_ray.envs.alfworld.tasks",
    "scienceworld": "step_ray.envs.scienceworld.tasks",
    "webshop": "step_ray.envs.webshop.tasks",
}
"""Environment name -> module of its tasks (see `base.TaskSource`)."""


def task_source(name: str) -> "TaskSource":
    """Where the tasks of an environment come from.

    Raises:
        ConfigError: no environment has that name.
    """
    source: TaskSource = _registered(SOURCES, name)
    return source


EXPERTS: dict[str, str] = {
    "alfworld": "step_ray.envs.alfworld.judge:RuleExpert",
    "scienceworld": "step_ray.envs.scienceworld.expert:GoldExpert",
    "webshop": "step_ray.envs.webshop.judge:ShopExpert",
}
"""Environment name -> `module:class` that makes an expert of a task (see `base.Expert`)."""


def has_expert(name: str) -> None:
    """Refuse an environment without expert.

    Raises:
        ConfigError: the environment has none; use an LLM teacher.
    """
    if name not in EXPERTS:
        raise ConfigError(f"teacher.kind: {name!r} has no expert; set teacher.kind to 'llm'")


def make_expert(task: "Task") -> "Expert":
    """The expert of one task; cheap, it keeps no state.

    Raises:
        ConfigError: the environment has none.
        DataError: the task lacks what its expert has to know.
    """
    has_expert(task.env)
    expert: Expert = _registered(EXPERTS, task.env)(task)
    return expert


def _registered(table: dict[str, str], name: str) -> Any:
    if name not in table:
        raise ConfigError(f"env.name: {name!r} is not known; use one of {sorted(table)}")
    module, _, attribute = table[name].partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"env.name: {name!r} needs the package {exc.name!r}; pip install 'step-ray[{name}]'"
        ) from exc
    return getattr(loaded, attribute) if attribute else loaded
