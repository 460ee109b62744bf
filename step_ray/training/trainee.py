"""The model under training: built, given a LoRA, made data-parallel; and its optimizer.

Takes a student and a `TrainConfig`, gives a module that trains on one device. It computes no loss
(learner.py), writes no file (state.py) and starts no cluster: a process group is the
caller's.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from step_ray.config import TrainConfig
from step_ray.errors import ConfigError
from step_ray.training.kernels import use_liger
from step_ray.training.sharding import load_in_shards
from step_ray.training.student import empty_model, load_model


def make_trainee(
    init: str, dtype: str, config: TrainConfig, seed: int, device: torch.device
) -> tuple[Any, nn.Module]:
    """The student of `init` on `device`, data-parallel as configured.

    The process group, if there is one, was made by the caller; without one the model stays bare.
    With DDP every rank reads the whole model. With FSDP2 rank 0 reads it and hands out the shares.

    Returns:
        The model, and what is called in training: the model itself, or the DDP around it.

    Raises:
        ConfigError: see `build_model`.
    """
    build = partial(build_model, init, dtype, config, seed)
    if config.strategy == "fsdp2" and dist.is_initialized():
        empty, split = partial(build, empty=True), partial(shard, config=config, device=device)
        model = load_in_shards(build, empty, split, device)
        return model, model
    model = build().to(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model, model
    own = [device] if device.type == "cuda" else None
    return model, DistributedDataParallel(
        model, device_ids=own, gradient_as_bucket_view=True, broadcast_buffers=False
    )


def build_model(
    init: str, dtype: str, config: TrainConfig, seed: int, *, empty: bool = False
) -> Any:
    """The student of `init` as it is trained, on CPU: with a LoRA if configured.

    The seed makes the LoRA's random start the same on all ranks. An `empty` one is on the meta
    device and has no weights.

    Raises:
        ConfigError: it cannot be loaded, has no module of a name in `lora_targets`, or not the
            wanted attention.
    """
    # trained weights stay float32 when bfloat16 only computes: their updates are too small for it
    is_master = config.autocast == "bfloat16" and not config.lora_rank
    load = empty_model if empty else load_model
    model: Any = load(init, "float32" if is_master else dtype)
    if config.attention != "auto":
        _set_attention(model, config.attention)
    if config.liger:
        use_liger(model)
    if config.lora_rank:
        model = _with_lora(model, config, seed, empty=empty)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for block in _decoder_blocks(model):
            block.compile(dynamic=True)  # texts have any length
    return model


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as exc:
        line = " ".join(str(exc).split())[:200]
        raise ConfigError(
            f"train.attention: {name!r} cannot be used here; try auto ({line})"
        ) from exc


def _with_lora(model: Any, config: TrainConfig, seed: int, *, empty: bool) -> Any:
    """The model with a LoRA, whose weights are float32 whatever the base's are."""
    from peft import LoraConfig, get_peft_model

    targets = config.lora_targets
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, lora, low_cpu_mem_usage=empty)
    except ValueError as exc:
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        names = {name.rpartition(".")[2] for name in linear}
        raise ConfigError(
            f"train.lora_targets: {targets!r} is not in the model; it has {sorted(names)}"
        ) from exc


def shard(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Apply FSDP2 to a model, a group of weights per decoder block, over all ranks."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = torch.bfloat16 if config.autocast == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    for block in _decoder_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _decoder_blocks(model: Any) -> list[nn.Module]:
    """The repeated layers, as the model itself names them (they must stay whole on a device)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())
    return [module for module in base.modules() if type(module).__name__ in names]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
