"""The configuration of a run: one pydantic model per stage, unknown keys refused.

Takes a YAML file and `a.b=c` overrides, gives a `RunConfig`. It reads no data and opens no
connection; what needs that is checked by `pipeline.preflight`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from step_ray.collection.config import CollectConfig, StudentEndpoint
from step_ray.collection.teacher_config import Price, TeacherConfig
from step_ray.env_config import EnvConfig, Section
from step_ray.errors import ConfigError
from step_ray.serving.config import ServeConfig
from step_ray.storage.places import holds_secret, is_url, mirror, url_fault, url_of
from step_ray.training.config import TrainConfig
from step_ray.training.recipe import DatasetConfig, Recipe

NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
"""Names that are folders of a run."""
BASE = "base"
"""Name of the base agent among the models."""
AGENT_FREE_KEYS = ("prompt", "work_dir", "max_concurrency", "max_new_tokens")
"""Of `serve.agent`, what may differ from the run though the agent plays its evaluation: each
request says it, or it changes no episode."""


class RayConfig(Section):
    """Where the work runs."""

    address: str = "local"
    """`local` starts a private cluster; `auto` joins the one of a Ray job; else an address."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; default: at least 4, so that readers and actors fit."""
    object_store_mb: int = Field(default=300, ge=80)
    """Object store of a local cluster, MiB."""
    log_format: Literal["text", "json"] = "text"
    """`json`: progress and Ray's logs of all workers, one JSON object a line, with the ids of run,
    stage, task and episode."""


class ScratchConfig(Section):
    """Shape of a student made on the spot (`student.init: scratch`)."""

    vocab_size: int = Field(default=512, ge=64)
    hidden_size: int = Field(default=128, ge=16)
    num_layers: int = Field(default=4, ge=1)
    num_heads: int = Field(default=4, ge=1)


class StudentConfig(Section):
    """The model that is trained."""

    init: str = "builtin:tiny-base"
    """A model folder, a Hugging Face hub id, `builtin:<name>` (shipped), or `scratch`."""
    chat_template: str = ""
    """A Jinja file, or `builtin:chatml`, in place of the tokenizer's own template (empty): for base
    models, and for templates that rewrite earlier turns (Qwen3: builtin:chatml)."""
    system: Literal["role", "fold"] = "role"
    """Where the instruction stands: in a message of its own, or before the first observation, for
    templates that refuse the role (Gemma) or move its text to the last question (Mistral v3)."""
    max_length: int = Field(default=2048, ge=64)
    """Context in tokens; longer examples are dropped and counted, longer prompts end an episode."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights while training and serving."""
    scratch: ScratchConfig = ScratchConfig()


class TasksConfig(Section):
    """How many tasks of which split; U1 and U2 are disjoint parts of the training split."""

    num_expert: int = Field(default=300, ge=1)
    """U1: tasks with golden trajectories."""
    num_collect: int = Field(default=300, ge=1)
    """U2: tasks on which the student acts under the teacher."""
    num_eval: int | Literal["all"] = 100
    """Evaluation tasks of each split; `all` that are there."""
    eval_split: str | tuple[str, ...] = "valid_unseen"
    """What is evaluated on: a held-out split, or several, as `[valid_seen, valid_unseen]`."""

    # before pydantic tries the parts of a union, whose errors name types and not what to give
    @field_validator("num_eval", mode="before")
    @classmethod
    def _is_a_number_or_all(cls, value: object) -> object:
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_number and value != "all":
            raise ValueError("give a number of 1 or more, or all")
        return value

    @field_validator("eval_split", mode="before")
    @classmethod
    def _splits_differ(cls, value: object) -> object:
        names = value if isinstance(value, list | tuple) else [value]
        is_right = all(isinstance(name, str) and name for name in names)
        if not (names and is_right and len(set(names)) == len(names)):
            raise ValueError("give a split, or a list of different ones")
        return value

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """The held-out splits."""
        return (self.eval_split,) if isinstance(self.eval_split, str) else self.eval_split


class OwnConfig(Section):
    """Rollouts of the base agent alone on U2, made when an arm asks for `own_success`."""

    num_samples: int = Field(default=4, ge=1)
    """Episodes per task, each with a seed of its own."""
    temperature: float = Field(default=0.7, ge=0)

    @model_validator(mode="after")
    def _samples_differ(self) -> "OwnConfig":
        if self.num_samples > 1 and not self.temperature:
            raise ValueError("temperature 0 plays every sample alike; raise it or num_samples: 1")
        return self


class EvaluateConfig(Section):
    """Evaluation through the served endpoint."""

    concurrency: int = Field(default=32, ge=1)
    """Episodes at once: in each actor, or, where the agent plays, in all."""
    where: Literal["actors", "agent"] = "actors"
    """Who runs the environments: actors of the cluster, which ask the agent for each turn; or the
    agent's own replicas (`/v1/episodes`), which saves the way of each turn. The episodes are the
    same. A model of `--base-url` is always asked by actors. With `engine: vllm` a replica of the
    engine that dies ends the episodes that ask it by an error, where actors would ask again."""
    temperature: float = Field(default=0.0, ge=0)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """One pass over the tasks per seed (only useful with a temperature)."""
    confidence: float = Field(default=0.95, gt=0, lt=1)


class RunConfig(Section):
    """A whole run."""

    name: str = Field(pattern=f"^{NAME}$")
    """Name of the run folder under `output_dir`."""
    output_dir: str = "runs"
    """A folder that all nodes see, or `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`: then each node
    keeps a copy of what it needs below $STEP_RAY_CACHE (~/.cache/step_ray)."""
    seed: int = 0
    ray: RayConfig = RayConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    prices: dict[str, Price] = Field(default={})
    """Model -> its price; a model that is not here costs nothing."""
    env: EnvConfig = EnvConfig()
    tasks: TasksConfig = TasksConfig()
    train: TrainConfig = TrainConfig()
    train_arm: dict[str, Any] = Field(default={})
    """Fields of `train` that differ for the arms (after the base agent)."""
    collect: CollectConfig = CollectConfig()
    own: OwnConfig = OwnConfig()
    dataset: DatasetConfig = DatasetConfig()
    arms: dict[str, Recipe] = Field(
        default={
            "golden_only": Recipe(policy="golden_only"),
            "step": Recipe(policy="step"),
            "step_no_mask": Recipe(policy="no_mask"),
        }
    )
    """Trained and evaluated next to the base agent, in this order."""
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("output_dir")
    @classmethod
    def _output_is_a_place(cls, value: str) -> str:
        if holds_secret(value):
            raise PydanticCustomError(
                "secret_in_url",
                "an address with a user or a query; credentials come from the environment or the"
                " machine's role, another server from AWS_ENDPOINT_URL",
            )
        fault = url_fault(value) if is_url(value) else None
        if fault:
            raise ValueError(fault)
        return value

    @model_validator(mode="after")
    def _budget_has_a_price(self) -> "RunConfig":
        teacher = self.teacher
        if teacher.budget.money is not None and teacher.model not in self.prices:
            raise ValueError(
                f"teacher.budget.money: prices has no {teacher.model!r}, only"
                f" {sorted(self.prices)}; add it, or budget calls or tokens"
            )
        return self

    @model_validator(mode="after")
    def _turns_fit_the_context(self) -> "RunConfig":
        turn, context = self.collect.max_new_tokens, self.student.max_length
        if self.collect.endpoint is None and turn >= context:
            raise ValueError(
                f"collect.max_new_tokens: {turn} leaves no room for a prompt in student.max_length"
                f" {context}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _arm_training_is_valid(self) -> "RunConfig":
        unknown = sorted(set(self.train_arm) - set(TrainConfig.model_fields))
        if unknown:
            known = sorted(TrainConfig.model_fields)
            raise ValueError(f"train_arm.{unknown[0]}: unknown key; use one of {known}")
        try:
            self.arm_train()
        except ValidationError as exc:
            raise ValueError(f"train_arm.{_first_fault(exc)}") from exc
        return self

    @model_validator(mode="after")
    def _arm_names_are_free(self) -> "RunConfig":
        for name in self.arms:
            if name in (BASE, "student"):
                raise ValueError(f"arms: the name {name!r} is taken; rename the arm")
            if not re.fullmatch(NAME, name):
                raise ValueError(f"arms: {name!r} is no folder name; use letters, digits and . _ -")
        return self

    @model_validator(mode="after")
    def _best_needs_a_validation(self) -> "RunConfig":
        for key, train in (("train", self.train), ("train_arm", self.arm_train())):
            if train.select == "best" and not self.dataset.holds_out:
                raise ValueError(
                    f"{key}.select: 'best' needs a validation loss; set dataset.validation_share"
                )
        return self

    @model_validator(mode="after")
    def _base_agent_is_whole(self) -> "RunConfig":
        if self.train.lora_rank and self.train.export == "adapter":
            raise ValueError(
                "train.export: the base agent is what arms start from and what is served; use"
                " 'merged' there (train_arm may export adapters)"
            )
        return self

    def arm_train(self) -> TrainConfig:
        """The training settings of the arms: `train` with the fields of `train_arm` over it."""
        return TrainConfig.model_validate({**self.train.model_dump(), **self.train_arm})

    @property
    def run_dir(self) -> Path:
        """Folder of the run; of one in a store, its mirror on this node."""
        return mirror(self.output_dir) / self.name

    @property
    def served(self) -> ServeConfig:
        """The section `serve`, whose agent plays episodes as those of the run are played."""
        agent = self.serve.agent.with_defaults(**self._agent_of_run())
        return self.serve.model_copy(update={"agent": agent})

    def _agent_of_run(self) -> dict[str, Any]:
        """What the run says of `serve.agent`; None where it says nothing."""
        number = self.tasks.num_eval
        return {
            "prompt": self.env.prompt,
            "before_execution": self.teacher.when == "before_execution",
            "envs": {self.env.name: self.env},
            # apart from the run's own games, which define its task lists; in no mirror, whose
            # files are those of the store
            "work_dir": "" if url_of(self.run_dir) else str((self.run_dir / "serve").resolve()),
            "num_generated": number if isinstance(number, int) else None,
            "max_concurrency": max(self.serve.agent.max_concurrency, self.evaluate.concurrency),
            "max_episodes": max(self.serve.agent.max_episodes, self.evaluate.concurrency),
            "max_new_tokens": self.collect.max_new_tokens,
            "max_format_errors": self.collect.max_format_errors,
            "step_timeout_s": self.collect.step_timeout_s,
            "episode_timeout_s": self.collect.episode_timeout_s,
        }

    @model_validator(mode="after")
    def _agent_plays_what_is_recorded(self) -> "RunConfig":
        if self.evaluate.where != "agent":
            return self
        agent, of_run = self.serve.agent, self._agent_of_run()
        for key in sorted(agent.said):
            value, wanted = getattr(agent, key), of_run.get(key)
            if key == "envs":
                value, wanted = agent.envs.get(self.env.name), self.env
            is_free = key in AGENT_FREE_KEYS or value is None or wanted is None
            if not is_free and value != wanted:
                raise ValueError(
                    f"serve.agent.{key}: differs from what the run's episodes are played by; leave"
                    " it out, or evaluate.where: actors"
                )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, lay `a.b=c` overrides (values in YAML) over it and validate.

    Raises:
        ConfigError: one line that names the file or key, the value and what to do.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"config: {str(path)!r} cannot be read ({exc.strerror})") from exc
    except yaml.YAMLError as exc:
        line = " ".join(str(exc).split())
        raise ConfigError(f"config: {str(path)!r} is not valid YAML: {line}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"config: {str(path)!r} must be a mapping of keys, see jobs/configs")
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> RunConfig:
    """Validate a resolved configuration.

    Raises:
        ConfigError: one line with the first fault (and how many more there are).
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as exc:
        raise ConfigError(_first_fault(exc)) from exc


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sep, value = override.partition("=")
    if not sep or not key:
        raise ConfigError(f"override: {override!r} is not of the form a.b=value")
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override: {key!r} goes through {parent!r}, which is no section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as exc:
        raise ConfigError(f"override: {override!r}: the value is not valid YAML") from exc


def _first_fault(exc: ValidationError) -> str:
    faults = exc.errors()
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"])
        return f"{key}: unknown key; use one of {known}{more}"
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    hidden = isinstance(value, dict | BaseModel) or first["type"] == "secret_in_url"
    shown = "" if hidden else f" (value: {value!r})"
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in loc[:-1]:
        if part in ("arms", "prices", "endpoint"):
            model = {"arms": Recipe, "prices": Price, "endpoint": StudentEndpoint}[str(part)]
        elif isinstance(model, type) and issubclass(model, Section) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
    return sorted(model.model_fields) if hasattr(model, "model_fields") else []


def expand_path(key: str, value: str) -> Path:
    """A path with environment variables and `~` expanded.

    Raises:
        ConfigError: a variable in it is not set.
    """
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        raise ConfigError(f"{key}: {value!r} names a variable that is not set; export it")
    return Path(expanded).expanduser()
