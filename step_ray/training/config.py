"""The settings of a training: batches, optimizer, LoRA, checkpoints, export, tracking.

Takes plain values, gives a `TrainConfig`. It says what is trained how; the code is loop.py's.
"""

from typing import Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from step_ray.cluster.labels import NodeLabels
from step_ray.env_config import Section

Workers: TypeAlias = int | tuple[int, int]
"""A number of workers, or the least and the most."""


class TrackingConfig(Section):
    """Where metrics go beside metrics.jsonl; the libraries are extras (`step-ray[tracking]`)."""

    tensorboard: bool = False
    """Event files in the folder `tensorboard` beside metrics.jsonl."""
    mlflow: str = ""
    """Address of a tracking server, or `sqlite:///<file>`, which needs the whole of mlflow; empty:
    off."""
    wandb: Literal["off", "offline", "online"] = "off"
    """`offline` writes below the folder of metrics.jsonl; `wandb sync` sends it later."""
    project: str = "step_ray"
    """MLflow experiment and W&B project."""

    @property
    def is_on(self) -> bool:
        """Whether anything beside metrics.jsonl is written."""
        return self.tensorboard or bool(self.mlflow) or self.wandb != "off"


class TrainConfig(Section):
    """Masked supervised fine-tuning."""

    num_workers: Workers = 1
    """A number, or `[least, most]`: then Ray uses as many as fit and changes the number when nodes
    come and go. The global batch is `batch_tokens` all the same."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs and torch threads of a worker."""
    use_gpu: bool = False
    node_labels: NodeLabels = Field(default={})
    """Workers run on the nodes with these Ray labels only; see `collect.node_labels`."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: each worker reads and holds the whole model. `fsdp2`: each holds a share of weights,
    gradients and optimizer; the first alone reads the model, in CPU memory for all of it."""
    epochs: int = Field(default=3, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to `final_lr_share` of the peak, or always the peak."""
    final_lr_share: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step of `cosine`, as a share of the peak."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps with rising learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    batch_tokens: int = Field(default=4096, ge=64)
    """Tokens of one optimizer step, over all workers and accumulation."""
    micro_batch_tokens: int = Field(default=4096, ge=64)
    """Tokens of one forward pass on one worker (padding included)."""
    packing: Literal["auto", "padded", "packed"] = "auto"
    """`packed`: examples end to end in one row, each attending to itself only; `padded`: one
    example a row; `auto`: packed if a trial on the model shows that its documents do not mix."""
    attention: Literal[
        "auto", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    """Implementation of transformers; `auto` and `sdpa` run each packed example by itself, on a GPU
    in bfloat16 by torch's flash attention, which needs no package."""
    loss_chunk: int = Field(default=0, ge=0)
    """Trained tokens whose logits are in memory at once; 0: derived from the vocabulary."""
    autocast: Literal["none", "bfloat16"] = "none"
    """`bfloat16` computes in bfloat16; trained weights, gradient sums and optimizer stay float32,
    whatever `student.dtype` says. `none` computes and keeps everything in `student.dtype`."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the decoder layers with torch.compile, all but attention over packed examples; the
    same code serves texts of all lengths. The first step takes minutes, and validation compiles
    once more; on CPU it needs g++ and gains little."""
    liger: bool = False
    """Liger's fused kernels in place of the model's norms, rotary embedding and gated MLP: faster,
    and less is kept for the backward pass. Needs a GPU, `step-ray[liger]` and an architecture that
    Liger knows (Llama, Qwen, Mistral, Gemma and others)."""
    lora_rank: int = Field(default=0, ge=0)
    """0: full fine-tuning; else a LoRA of this rank, in float32: on a GPU set `autocast: bfloat16`
    with it, or its products are slow."""
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get one, or all linear layers but the output embedding."""
    validate_every: int = Field(default=0, ge=0)
    """Optimizer steps between validations, where tasks are held out; 0: only at the end."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    checkpoint_upload: Literal["async", "sync"] = "async"
    """`async` copies a checkpoint to the run folder while training goes on."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Checkpoints to keep: the newest ones, or with `select: best` the best and the newest."""
    select: Literal["last", "best"] = "last"
    """Which weights are exported: those of the end, or of the lowest validation loss. `best` makes
    a checkpoint at every validation."""
    export: Literal["merged", "adapter"] = "merged"
    """A LoRA is merged into a whole model, or kept as a PEFT adapter of its base."""
    max_failures: int = Field(default=2, ge=0)
    """Worker failures that are survived by restarting from the last checkpoint."""
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("num_workers")
    @classmethod
    def _workers_are_a_range(cls, value: Workers) -> Workers:
        least, most = (value, value) if isinstance(value, int) else value
        if not 1 <= least <= most:
            raise ValueError("give a number of 1 or more, or [least, most] in this order")
        return value

    @model_validator(mode="after")
    def _adapter_needs_a_lora(self) -> "TrainConfig":
        if self.export == "adapter" and not self.lora_rank:
            raise ValueError("export 'adapter' needs a LoRA; set lora_rank or export: merged")
        return self

    @model_validator(mode="after")
    def _liger_needs_a_gpu(self) -> "TrainConfig":
        if self.liger and not self.use_gpu:
            raise ValueError("liger needs a GPU; set use_gpu: true, or liger: false")
        return self

    @model_validator(mode="after")
    def _targets_are_named(self) -> "TrainConfig":
        if not self.lora_targets:
            raise ValueError("lora_targets names no module; give names or 'all-linear'")
        return self

    @property
    def most_workers(self) -> int:
        """The largest number of workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def least_workers(self) -> int:
        """The smallest number of workers that a training starts with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]


TRAIN_SPEED_ONLY = frozenset(
    {
        "num_workers",
        "cpus_per_worker",
        "use_gpu",
        "node_labels",
        "strategy",
        "micro_batch_tokens",
        "packing",
        "attention",
        "loss_chunk",
        "gradient_checkpointing",
        "compile",
        "liger",
        "checkpoint_every",
        "checkpoint_upload",
        "keep_checkpoints",
        "max_failures",
        "tracking",
    }
)
"""Settings that change how fast a training is and what is kept of it, not what is trained (up to
the order of sums); they may change between a killed training and its continuation."""
