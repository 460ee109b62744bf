"""One rank of a training: packs its share of a batch, computes the loss, steps the optimizer.

Takes examples, batches and a learning rate, gives losses. It knows neither the data order nor the
schedule (loop.py), writes no file (state.py) and needs no cluster: it runs alone, or in
whatever process group the caller made.
"""

import math
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from step_ray.config import TrainConfig
from step_ray.errors import StepRayError
from step_ray.training.batching import Examples, MicroBatch, collate, padding_share, split_batch
from step_ray.training.headloss import choose_head, trained_nll
from step_ray.training.layout import choose_layout, trial_inputs
from step_ray.training.loss import masked_loss
from step_ray.training.trainee import make_optimizer, make_trainee


class Learner:
    """One rank's model and optimizer. All ranks call the same methods in the same order."""

    def __init__(
        self, *, init: str, dtype: str, config: TrainConfig, seed: int, device: torch.device
    ) -> None:
        self.init, self.dtype, self.config, self.seed = init, dtype, config, seed
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        model, trained = make_trainee(init, dtype, config, seed, device)
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.model = trained.train()
        self._choose(model)
        self.optimizer = make_optimizer(self.model, config)

    def _choose(self, model: Any) -> None:
        """Decide on the batches and the head, each by a trial on the model itself."""
        bare = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        wanted, autocast = self.config.packing, self._autocast()
        self.layout = choose_layout(bare, base, wanted, device=self.device, autocast=autocast)
        inputs = trial_inputs(self.layout.packed, self.vocab_size, self.device)
        chunk = self.config.loss_chunk
        self.head = choose_head(
            bare, base, inputs, chunk=chunk, device=self.device, autocast=autocast
        )
        self._reshard()

    def _reshard(self) -> None:
        """After a forward without a backward, FSDP2 keeps the root's whole weights in their place,
        and an optimizer made then would train copies."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def train_batch(
        self, examples: Examples, batch: Sequence[int], *, number: int, lr: float
    ) -> dict[str, Any]:
        """Train one global batch, of which this rank takes its share.

        Args:
            examples: all training examples.
            batch: indices of the step's examples, over all ranks.
            number: number of the step, from 0.
            lr: learning rate.

        Returns:
            Its part of a line of metrics.jsonl.

        Raises:
            StepRayError: see `step`.
        """
        begun = time.monotonic()
        num_trained = int(examples.num_trained[list(batch)].sum())
        passes = self.passes(examples, batch)
        loss, norm = self.step(passes, number=number, num_trained=num_trained, lr=lr)
        seconds = time.monotonic() - begun
        tokens = int(examples.lengths[list(batch)].sum())
        return {
            "loss": loss,
            "grad_norm": norm,
            "trained_tokens": num_trained,
            "tokens": tokens,
            "padding_share": self.padding_share(examples, batch),
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
        }

    def passes(self, examples: Examples, batch: Sequence[int]) -> list[MicroBatch]:
        """This rank's forward passes of a global batch; as many on every rank."""
        own = self._shares(examples, batch)[self.rank]
        return [collate(examples, indices, packed=self.layout.packed) for indices in own]

    def _shares(self, examples: Examples, batch: Sequence[int]) -> list[list[list[int]]]:
        lengths = {i: int(examples.lengths[i]) for i in batch}
        budget, packed = self.config.micro_batch_tokens, self.layout.packed
        return split_batch(batch, lengths, self.world_size, budget, packed=packed)

    def padding_share(self, examples: Examples, batch: Sequence[int]) -> float:
        """Share of the positions of a global batch's passes that hold no token, over all ranks."""
        if self.layout.packed:
            return 0.0
        lengths = {i: int(examples.lengths[i]) for i in batch}
        return padding_share(self._shares(examples, batch), lengths)

    @torch.no_grad()
    def nll(self, passes: Sequence[MicroBatch]) -> float:
        """Sum of the negative log probabilities of the trained tokens, over all ranks.

        The model is put in evaluation mode meanwhile; its weights are left as they are.

        Args:
            passes: from `passes`, for instance over held-out examples.
        """
        self.model.eval()
        total = torch.zeros((), device=self.device)
        for batch in passes:
            total += self._loss(batch.to(self.device), num_trained=1)
        self.model.train()
        self._reshard()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.item()

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
            StepRayError: loss or gradient is not finite; the weights are left as they were.
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
            way_out = self._way_out(number)
            raise StepRayError(f"train: loss is {value} at step {number + 1}; {way_out}")
        return value, self._update(lr, number)

    def _way_out(self, number: int) -> str:
        """What to do about a loss that is not finite; the first is computed before any update."""
        if number:
            return "lower learning_rate"
        return f"look at the weights of {self.init!r}, or take another student.dtype"

    def _backward(self, batch: MicroBatch, num_trained: int) -> Tensor:
        loss = self._loss(batch, num_trained)
        # Both DDP and FSDP2 divide the sum of gradients by the number of ranks.
        (loss * self.world_size).backward()
        return loss.detach()

    def _loss(self, batch: MicroBatch, num_trained: int) -> Tensor:
        with self._autocast():
            nll = trained_nll(
                self.model, self.head, batch.inputs, batch.positions_N, batch.targets_N
            )
        return masked_loss(nll, num_trained)

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self.config.autocast == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def _sync_if(self, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces in the last pass only; FSDP2 in each, else it would keep whole gradients."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _update(self, lr: float, number: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm: Any = nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(value):
            raise StepRayError(
                f"train: the gradient's norm is {value} at step {number + 1}; lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value
