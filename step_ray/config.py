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
from pydantic import BaseModel, Field, ValidationError, model_validator

from step_ray.env_config import EnvConfig, Section
from step_ray.errors import ConfigError
from step_ray.serve_config import ServeConfig
from step_ray.teacher_config import Price, TeacherConfig

NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
"""Names that are folders of a run."""
BASE = "base"
"""Name of the base agent among the models."""


class RayConfig(Section):
    """Where the work runs."""

    address: str = "local"
    """`local` starts a private cluster; `auto` joins the one of a Ray job; else an address."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local cluster; default: at least 4, so that readers and actors fit."""
    object_store_mb: int = Field(default=300, ge=80)
    """Object store of a local cluster, MiB."""


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
    max_length: int = Field(default=4096, ge=64)
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
    num_eval: int = Field(default=100, ge=1)
    eval_split: str = "valid_unseen"


class TrainConfig(Section):
    """Masked supervised fine-tuning."""

    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs and torch threads of a worker."""
    use_gpu: bool = False
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps with rising learning rate; then cosine to 10 % of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_tokens: int = Field(default=4096, ge=64)
    """Tokens of one optimizer step, over all workers and accumulation."""
    micro_batch_tokens: int = Field(default=4096, ge=64)
    """Tokens of one forward pass on one worker (padding included)."""
    autocast: Literal["none", "bfloat16"] = "none"
    gradient_checkpointing: bool = False
    lora_rank: int = Field(default=0, ge=0)
    """0: full fine-tuning; else a LoRA of this rank on the linear layers, merged at export."""
    lora_alpha: float = Field(default=16.0, gt=0)
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    max_failures: int = Field(default=2, ge=0)
    """Worker failures that are survived by restarting from the last checkpoint."""


class CollectConfig(Section):
    """Rollouts of the base agent under the teacher."""

    num_actors: int = Field(default=1, ge=1)
    """Most rollout actors."""
    episodes_per_actor: int = Field(default=32, ge=1)
    """Episodes at once in one actor; they wait for LLMs concurrently."""
    cpus_per_actor: float = Field(default=0.5, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    """Per turn, for the student."""
    max_format_errors: int = Field(default=3, ge=1)
    """Unparsable answers of the student in a row before the episode ends."""
    step_timeout_s: float = Field(default=300.0, gt=0)
    episode_timeout_s: float = Field(default=3600.0, gt=0)
    rows_per_shard: int = Field(default=16, ge=1)
    """Episodes in one Parquet shard: what a killed job may lose per actor."""
    max_error_share: float = Field(default=0.05, ge=0, lt=1)
    """A stage of episodes (evaluation too) fails if a larger share ends by a fault of the machinery
    (env_error, llm_error, teacher_error, timeout); a rerun plays these episodes again."""


class DatasetConfig(Section):
    """What becomes a training example."""

    keep: Literal["success", "all"] = "success"
    """Trajectories that are kept."""
    min_reward: float | None = None
    """Keep by reward instead of success."""
    mask_suboptimal: bool = True
    """Mask suboptimal steps like errors."""


class Recipe(Section):
    """One training arm: its data, its mask, its start. A comparison is a list of arms."""

    golden: bool = True
    """Golden trajectories of U1."""
    golden_collect: bool = False
    """Golden trajectories of U2 tasks (control: golden-only with as many trajectories)."""
    self_reflected: bool = False
    """Self-reflected trajectories of U2."""
    mask_errors: bool = True
    """False: all agent steps are trained (ablation step_no_mask)."""
    error_steps: Literal["keep", "remove"] = "keep"
    """`remove` deletes error steps from the text (ablation step_replace)."""
    match: Literal["none", "trajectories", "trained_tokens"] = "none"
    """Cut golden_collect to the number of kept self-reflected trajectories, or repeat or cut the
    golden data to the trained tokens of golden + self-reflected."""
    init: Literal["base_agent", "student"] = "base_agent"
    """Where the arm starts: the base agent, or the model of `student.init`."""

    @model_validator(mode="after")
    def _sources_fit(self) -> "Recipe":
        if not (self.golden or self.golden_collect or self.self_reflected):
            raise ValueError(
                "the arm trains on nothing; set golden, golden_collect or self_reflected: true"
            )
        if self.match == "trajectories" and not self.golden_collect:
            raise ValueError(
                "match 'trajectories' cuts golden_collect; set golden_collect: true or match: none"
            )
        if self.match == "trained_tokens" and self.self_reflected:
            raise ValueError(
                "match 'trained_tokens' is for golden data; drop self_reflected or match"
            )
        return self


class EvaluateConfig(Section):
    """Evaluation through the served endpoint."""

    concurrency: int = Field(default=32, ge=1)
    """Episodes at once."""
    temperature: float = Field(default=0.0, ge=0)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """One pass over the tasks per seed (only useful with a temperature)."""
    confidence: float = Field(default=0.95, gt=0, lt=1)


class RunConfig(Section):
    """A whole run."""

    name: str = Field(pattern=f"^{NAME}$")
    """Name of the run folder under `output_dir`."""
    output_dir: str = "runs"
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
    dataset: DatasetConfig = DatasetConfig()
    arms: dict[str, Recipe] = Field(
        default={
            "golden_only": Recipe(golden_collect=True, match="trajectories"),
            "step": Recipe(self_reflected=True),
            "step_no_mask": Recipe(self_reflected=True, mask_errors=False),
        }
    )
    """Trained and evaluated next to the base agent, in this order."""
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

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

    def arm_train(self) -> TrainConfig:
        """The training settings of the arms: `train` with the fields of `train_arm` over it."""
        return TrainConfig.model_validate({**self.train.model_dump(), **self.train_arm})

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / self.name


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
        if part in ("arms", "prices"):
            model = {"arms": Recipe, "prices": Price}[str(part)]
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
