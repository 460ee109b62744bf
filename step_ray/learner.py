"""The model under training on one worker: built, wrapped, stepped, checkpointed, exported.

Takes micro-batches and a learning rate, gives the loss; writes checkpoints and a Hugging Face
folder. It knows neither the data order nor the schedule (train_loop.py) and starts no cluster.
"""

import math
import random
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from step_ray.batching import MicroBatch
from step_ray.config import TrainConfig
from step_ray.errors import StepRayError
from step_ray.loss import masked_loss, trained_logits
from step_ray.student import load_model, load_tokenizer, save_student

TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Checkpoints of a LoRA hold the adapter only; the frozen base comes from `init`."""


def build_model(init: str, dtype: str, config: TrainConfig, seed: int) -> Any:
    """The student of `init` as it is trained, on CPU: with a LoRA if configured.

    The seed makes the LoRA's random start the same on all ranks.
    """
    model: Any = load_model(init, dtype)
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        shape: dict[str, Any] = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
        lora = LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def wrap(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Move the model to the worker's device and make it data-parallel as configured."""
    if config.strategy == "ddp":
        options = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        return ray.train.torch.prepare_model(model, parallel_strategy_kwargs=options)
    device = ray.train.torch.get_device()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = torch.bfloat16 if config.autocast == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    for block in _decoder_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


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


class Learner:
    """One rank's model and optimizer. All ranks call the same methods in the same order."""

    def __init__(self, *, init: str, dtype: str, config: TrainConfig, seed: int, rank: int) -> None:
        self.init, self.dtype, self.config, self.seed, self.rank = init, dtype, config, seed, rank
        model = build_model(init, dtype, config, seed)
        self.head: nn.Module = model.get_output_embeddings()
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.model = wrap(model, config).train()
        self.optimizer = make_optimizer(self.model, config)
        self.device = ray.train.torch.get_device()
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def step(
        self, passes: Sequence[MicroBatch], *, number: int, num_trained: int, lr: float
    ) -> tuple[float, float]:
        """One optimizer step.

        Args:
            passes: this rank's micro-batches; as many on every rank.
            number: number of the step; dropout depends on it, so a resumed run repeats it.
            num_trained: trained tokens of the step over all ranks.
            lr: learning rate.

        Returns:
            Loss of the step over all ranks, and the norm of its gradient before clipping.

        Raises:
            StepRayError: the loss is not finite; the weights are left as they were.
        """
        torch.manual_seed(random.Random(f"{self.seed}/{number}/{self.rank}").getrandbits(63))
        loss = torch.zeros((), device=self.device)
        for batch in passes:
            with self._sync_if(batch is passes[-1]):
                loss += self._backward(batch.to(self.device), num_trained)
        if self.world_size > 1:
            dist.all_reduce(loss)
        value = loss.item()
        if not math.isfinite(value):
            raise StepRayError(f"train: loss is {value} at step {number}; lower learning_rate")
        return value, self._update(lr)

    def _backward(self, batch: MicroBatch, num_trained: int) -> Tensor:
        half = self.config.autocast == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            logits_NV = trained_logits(self.model, self.head, batch.input_ids_BT, batch.positions_N)
        loss = masked_loss(logits_NV, batch.targets_N, num_trained)
        # Both DDP and FSDP2 divide the sum of gradients by the number of ranks.
        (loss * self.world_size).backward()
        return loss.detach()

    def _sync_if(self, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces in the last pass only; FSDP2 in each, else it would keep whole gradients."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _update(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm: Any = nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def save(self, folder: str, step: int) -> None:
        """Write this rank's part of a checkpoint; the parts of all ranks make a whole one."""
        dcp.save({**self._state(), "step": torch.tensor(step)}, checkpoint_id=folder)

    def restore(self, folder: str) -> int:
        """Read a checkpoint of any number of ranks; gives its number of finished steps."""
        state = {**self._state(), "step": torch.tensor(0)}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINABLE_ONLY,
        )
        return int(state["step"])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=TRAINABLE_ONLY)
        return {"model": model, "optimizer": optimizer}

    def export(self, folder: Path) -> None:
        """Gather the weights (all ranks) and write a Hugging Face folder (rank 0), LoRA merged."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=whole)
        if self.rank:
            return
        model = build_model(self.init, self.dtype, self.config, self.seed)
        model.load_state_dict(state)
        if self.config.lora_rank:
            model = model.merge_and_unload()
        shutil.rmtree(folder, ignore_errors=True)
        save_student(folder, model, load_tokenizer(self.init))
