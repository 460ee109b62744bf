"""Text environments: a dict name -> import string, so that none loads before it is asked for."""

from importlib import import_module

from step_ray.envs.base import Expert, TextEnv
from step_ray.errors import ConfigError

REGISTRY: dict[str, str] = {
    "alfworld": "step_ray.envs.alfworld.env:AlfworldEnv",
    "scienceworld": "step_ray.envs.scienceworld.env:ScienceworldEnv",
}
"""Environment name -> `module:class`; add a line here to add an environment."""


def make_env(name: str, **options: object) -> TextEnv:
    """Build the environment registered as `name`.

    Raises:
        ConfigError: no environment has that name.
    """
    if name not in REGISTRY:
        raise ConfigError(f"env.name: {name!r} is not known; use one of {sorted(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    env: TextEnv = getattr(import_module(module), attribute)(**options)
    return env


EXPERTS: dict[str, str] = {
    "alfworld": "step_ray.envs.alfworld.judge",
}
"""Environment name -> module with `propose` and `judge` (see `base.Expert`)."""


def load_expert(name: str) -> Expert:
    """The expert of an environment.

    Raises:
        ConfigError: the environment has none; use an LLM teacher.
    """
    if name not in EXPERTS:
        raise ConfigError(f"teacher.kind: {name!r} has no expert; set teacher.kind to 'llm'")
    expert: Expert = import_module(EXPERTS[name])
    return expert
