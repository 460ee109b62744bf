"""The settings of the text environments, each with its own keys and defaults.

Takes plain values, gives an `EnvConfig`, which answers what the other modules ask: how to build the
environment, and which settings define a task list or an episode. It loads no environment.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from step_ray.envs.alfworld.tables import TASK_ROOMS
from step_ray.envs.scienceworld import tables

ALFWORLD_TASK_TYPES = tuple(TASK_ROOMS)
ALFWORLD_ONLY = ("source", "engine", "data_dir", "generator")
"""Keys that say nothing to other environments."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class GeneratorConfig(Section):
    """Games made on the spot (`env.source: generated`)."""

    size: Literal["tiny", "small", "full"] = "small"
    """How many receptacles and objects a room has."""
    seed: int = 0


class ScienceworldConfig(Section):
    """What only ScienceWorld has (`env.name: scienceworld`)."""

    preset: Literal["official", "eto"] = "official"
    """`eto` changes the defaults to those of ETO (arXiv 2403.02502): 24 task types, at most 10
    held-out variations each, its step limits and its scoring. Keys that are given win."""
    simplification: str = "easy"
    """The engine's simplifications, joined by commas; empty: none."""
    scoring: Literal["final", "eto"] = "final"
    """The score that evaluations show: the one the episode ends with, or ETO's."""
    train_per_type: int | None = Field(default=None, ge=1)
    """Training variations per task type that are used, the first ones; None: all."""
    held_out_per_type: int | None = Field(default=None, ge=1)
    """The same of the held-out split."""
    list_actions: bool = False
    """Let the teacher see all valid actions: ten times slower, up to 3,000 entries."""
    heap_mb: int = Field(default=512, ge=64)
    """Largest heap of an actor's Java machine, MiB; all worlds of the actor are in it."""
    gold_dir: str = "gold/scienceworld"
    """Cache of gold paths, shared by runs; environment variables are expanded."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") == "eto":
            return {"scoring": "eto", "held_out_per_type": tables.ETO_PER_TYPE, **data}
        return data

    @model_validator(mode="after")
    def _simplification_is_known(self) -> "ScienceworldConfig":
        tables.check_simplification(self.simplification)
        return self


class EnvConfig(Section):
    """The text environment."""

    name: str = "alfworld"
    source: Literal["generated", "official"] = "generated"
    """ALFWorld: `official` reads the games under `data_dir`."""
    engine: Literal["native", "textworld"] = "native"
    """ALFWorld: the engine of step_ray or the official one."""
    data_dir: str = "${ALFWORLD_DATA}"
    """ALFWorld: folder that holds json_2.1.1; environment variables are expanded."""
    max_steps: int = Field(default=40, ge=1)
    """Actions per episode, corrections included."""
    max_steps_by_type: dict[str, int] = {}
    """Task type -> another limit for it."""
    prompt: str = "alfworld_v1"
    """Instruction text, the same in collection, training and evaluation."""
    generator: GeneratorConfig = GeneratorConfig()
    """ALFWorld: how games are generated."""
    task_types: tuple[str, ...] = ALFWORLD_TASK_TYPES
    scienceworld: ScienceworldConfig = ScienceworldConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_environment(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("name") != "scienceworld":
            return data
        section = data.get("scienceworld")
        eto = isinstance(section, Mapping) and section.get("preset") == "eto"
        return {
            "prompt": "scienceworld_v1",
            "max_steps": 100,
            "max_steps_by_type": dict(tables.ETO_MAX_STEPS) if eto else {},
            "task_types": tuple(tables.ETO_MAX_STEPS) if eto else tables.TASK_TYPES,
            **data,
        }

    @model_validator(mode="after")
    def _keys_belong_to_the_environment(self) -> "EnvConfig":
        fields = type(self).model_fields
        foreign = ["scienceworld"] if self.name == "alfworld" else []
        foreign = list(ALFWORLD_ONLY) if self.name == "scienceworld" else foreign
        for key in foreign:
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} says nothing to env.name {self.name!r}; remove it")
        known = {"alfworld": ALFWORLD_TASK_TYPES, "scienceworld": tables.TASK_TYPES}.get(self.name)
        for key, types in (
            ("task_types", self.task_types),
            ("max_steps_by_type", self.max_steps_by_type),
        ):
            unknown = sorted(set(types) - set(known or types))
            if unknown:
                raise ValueError(f"{key}: {unknown[0]!r} is no task type of {self.name}: {known}")
        return self

    def options(self) -> dict[str, Any]:
        """What the environment is built with."""
        if self.name == "scienceworld":
            keys = {"simplification", "heap_mb", "list_actions"}
            return self.scienceworld.model_dump(include=keys)
        return {"engine": self.engine}

    @property
    def scoring(self) -> str:
        """The score that evaluations show, see scores.SCORES."""
        return self.scienceworld.scoring if self.name == "scienceworld" else "final"

    def task_settings(self) -> dict[str, Any]:
        """What defines the task lists."""
        keys = {"name", "task_types"}
        if self.name == "scienceworld":
            own = {"train_per_type", "held_out_per_type"}
            return {
                **self.model_dump(include=keys),
                "scienceworld": self.scienceworld.model_dump(include=own),
            }
        official = {"data_dir"} if self.source == "official" else set()
        return self.model_dump(include={*keys, "source", "generator", *official})

    def episode_settings(self) -> dict[str, Any]:
        """What defines an episode apart from its task and its players."""
        keys = {"max_steps", "prompt"} | (
            {"max_steps_by_type"} if self.max_steps_by_type else set()
        )
        if self.name == "scienceworld":
            own = {"simplification", "list_actions"}
            return {
                **self.model_dump(include=keys),
                "scienceworld": self.scienceworld.model_dump(include=own),
            }
        return self.model_dump(include={*keys, "engine"})
