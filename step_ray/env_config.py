"""The settings of the text environments, each with its own keys and defaults.

Takes plain values, gives an `EnvConfig`, which answers what the other modules ask: how to build the
environment, and which settings define a task list or an episode. It loads no environment.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from step_ray.envs.alfworld.tables import TASK_ROOMS
from step_ray.envs.scienceworld import tables
from step_ray.envs.webshop.tables import CATEGORIES

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


class ShopGeneratorConfig(Section):
    """A shop made on the spot (`env.webshop.source: generated`)."""

    num_products: int = Field(default=300, ge=20)
    seed: int = 0


class WebshopConfig(Section):
    """What only WebShop has (`env.name: webshop`)."""

    source: Literal["generated", "official"] = "generated"
    """`official` reads the files in `data_dir`."""
    data_dir: str = "${WEBSHOP_DATA}"
    """Folder of items_shuffle*.json, items_ins_v2*.json and items_human_ins.json, as the set-up of
    princeton-nlp/WebShop brings them; environment variables are expanded."""
    products: str = ""
    """Name of the file of products, where the folder holds several; empty: the only one."""
    annotations: str = ""
    """The same of items_ins_v2."""
    num_products: int | None = Field(default=None, ge=1)
    """First products of the file that are used; None: all."""
    cache_dir: str = "cache/webshop"
    """Where converted catalogues are kept, shared by runs; environment variables are expanded."""
    goals: Literal["synthetic", "human"] = "synthetic"
    """Instructions written by rule from products and options, or by people."""
    splits: Literal["official", "agentgym"] = "official"
    """`official`: of the goals in the official order the first 500 are `test`, the next 1,000
    `dev`, the others `train`; `agentgym`: AgentGym's lists for the 1,000 products."""
    split_dir: str = "${WEBSHOP_DATA}"
    """Folder of AgentGym's lists, `*webshop_train.json` and `*webshop_test.json`."""
    price_seed: int = 0
    """Draws the price limits of the goals, and the prices that the shop gives as a range."""
    observation: Literal["text", "text_rich"] = "text"
    show_attributes: bool = False
    """Pages of products have a button that shows their attributes, which the reward counts."""
    num_prev_obs: int = Field(default=0, ge=0)
    """Earlier observations before each observation, for agents that see no conversation."""
    num_prev_actions: int = Field(default=0, ge=0)
    """The same of actions."""
    generator: ShopGeneratorConfig = ShopGeneratorConfig()


WEBSHOP_TASKS = {"source", "goals", "price_seed"}
WEBSHOP_FILES = {"data_dir", "products", "annotations", "num_products", "splits", "split_dir"}
WEBSHOP_EPISODE = {"observation", "show_attributes", "num_prev_obs", "num_prev_actions"}
"""Keys that define task lists, those of the official files, and those that define an episode."""
SECTIONS = {"scienceworld", "webshop"}
"""Sections that belong to the environment of their name only."""


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
    webshop: WebshopConfig = WebshopConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_environment(cls, data: Any) -> Any:
        name = data.get("name") if isinstance(data, Mapping) else None
        if name == "webshop":
            return {"prompt": "webshop_v1", "max_steps": 15, "task_types": CATEGORIES, **data}
        if name != "scienceworld":
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
        known = {
            "alfworld": ALFWORLD_TASK_TYPES,
            "scienceworld": tables.TASK_TYPES,
            "webshop": CATEGORIES,
        }.get(self.name)
        foreign = sorted(SECTIONS - {self.name}) if known else []
        foreign += ALFWORLD_ONLY if self.name in SECTIONS else ()
        for key in foreign:
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} says nothing to env.name {self.name!r}; remove it")
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
        if self.name == "webshop":
            return self.webshop.model_dump(include=WEBSHOP_EPISODE)
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
        if self.name == "webshop":
            given = self.webshop.source == "official"
            own = WEBSHOP_TASKS | (WEBSHOP_FILES if given else {"generator"})
            return {
                **self.model_dump(include=keys),
                "webshop": self.webshop.model_dump(include=own),
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
        if self.name == "webshop":
            return {
                **self.model_dump(include=keys),
                "webshop": self.webshop.model_dump(include=WEBSHOP_EPISODE),
            }
        return self.model_dump(include={*keys, "engine"})
