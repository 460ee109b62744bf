"""Whether examples are packed into one row or padded, and by which attention: chosen by a trial.

Takes a model that is ready to train, gives a `Layout`; may change the model's attention. Packing is
believed of no model: two short documents in one row must give the logits that the second has alone,
and must not notice when the first changes. It builds no batch (batching.py) and computes no loss.
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from step_ray.errors import ConfigError
from step_ray.training.attention import DOCUMENTS, Unsupported, register
from step_ray.training.batching import packed_inputs
from step_ray.training.headloss import computes_in_half

Wanted = Literal["auto", "padded", "packed"]
LENGTHS = (7, 11)
"""Tokens of the two documents of the trial."""
MATCH, MATCH_HALF = 1e-4, 5e-2
"""Largest difference from the logits of the document alone, as a share of the largest logit, where
the model computes in float32 or in half precision."""
LEAK, LEAK_HALF = 1e-6, 1e-2
"""Largest change by another first document; the same work in the same order should give none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How examples share a forward pass."""

    packed: bool
    """Examples end to end in one row; else one example a row, padded on the right."""
    attention: str
    """The attention implementation, by its name in transformers."""
    reason: str
    """Why, in one line."""

    def __str__(self) -> str:
        kind = "packed" if self.packed else "padded"
        return f"batches are {kind}, attention {self.attention} ({self.reason})"


def choose_layout(
    model: Any,
    base: Any,
    wanted: Wanted,
    *,
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
) -> Layout:
    """The layout of a training; all ranks call it together and get the same.

    Args:
        model: the model to run; sharded or not, but not in DDP.
        base: the Hugging Face model within it, whose attention is set.
        wanted: `auto` packs wherever it is right.
        device: where the model is.
        autocast: in which training runs.

    Raises:
        ConfigError: `packed` is wanted, and this model cannot be packed right.
    """
    first = str(base.config._attn_implementation)
    if wanted == "padded":
        return Layout(packed=False, attention=first, reason="train.packing: padded")
    reasons = []
    if not _takes(base, "position_ids"):
        reasons.append("the model takes no position_ids")
    else:
        trial = _Trial(model, base, device, autocast or nullcontext())
        for name in _candidates(base, first):
            base.set_attn_implementation(name)
            fault = trial.fault()
            if fault is None:
                return Layout(packed=True, attention=name, reason="two documents do not mix")
            reasons.append(f"{name}: {fault}")
        base.set_attn_implementation(first)
    if wanted == "packed":
        raise ConfigError(
            f"train.packing: 'packed' is not right for {type(base).__name__}"
            f" ({'; '.join(reasons)}); use auto or padded"
        )
    return Layout(packed=False, attention=first, reason="; ".join(reasons))


def _takes(base: Any, name: str) -> bool:
    parameters = inspect.signature(base.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _candidates(base: Any, first: str) -> list[str]:
    """Attention implementations to try, the fastest first.

    Flash attention of transformers knows documents by itself. So does its mask, at the price of
    T * T; it is left to kinds of attention that `DOCUMENTS` does not know.
    """
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    plain = kinds <= {"full_attention", "sliding_attention"}
    if first == "sdpa" and plain and _takes(base, "cu_seq_lens_q"):
        register()
        return [DOCUMENTS, first]
    return [first]


def trial_inputs(packed: bool, vocab_size: int, device: torch.device) -> dict[str, Any]:
    """Inputs of a short forward pass in a layout: what a model is tried with."""
    ids_BT = torch.arange(sum(LENGTHS))[None] * 5 % vocab_size
    inputs = {"input_ids": ids_BT, **(packed_inputs(torch.tensor(LENGTHS)) if packed else {})}
    return _placed(inputs, device)


def _placed(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


class _Trial:
    """Runs two short documents, packed and alone."""

    def __init__(
        self, model: Any, base: Any, device: torch.device, autocast: AbstractContextManager[Any]
    ) -> None:
        self.model, self.base, self.device, self.autocast = model, base, device, autocast
        vocab_size = base.get_input_embeddings().num_embeddings
        first, second = LENGTHS
        self.documents = [
            torch.arange(first) * 5 % vocab_size,
            torch.arange(first) * 3 % vocab_size + vocab_size // 2,
            torch.arange(second) * 7 % vocab_size,
        ]
        self.documents[1] %= vocab_size
        self.alone = self._logits({"input_ids": self.documents[2][None]})

    def fault(self) -> str | None:
        """What is wrong with the model's present attention; the same answer on all ranks."""
        try:
            one, other = (
                self._logits(self._packed(first))[LENGTHS[0] :] for first in self.documents[:2]
            )
        except Unsupported as exc:
            return self._agree(str(exc))
        scale = self.alone.abs().max().item()
        leak = (one - other).abs().max().item() / scale
        gap = (one - self.alone).abs().max().item() / scale
        if not leak <= (LEAK_HALF if self.is_half else LEAK):
            return self._agree(f"a document sees the one before it, by {leak:.1e} of the logits")
        if not gap <= (MATCH_HALF if self.is_half else MATCH):
            return self._agree(f"packed logits are off by {gap:.1e} of the largest")
        return self._agree(None)

    def _packed(self, first: Tensor) -> dict[str, Any]:
        inputs = packed_inputs(torch.tensor(LENGTHS))
        return {"input_ids": torch.cat([first, self.documents[2]])[None], **inputs}

    @torch.no_grad()
    def _logits(self, inputs: Mapping[str, Any]) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        # Layers that are compiled for training run as they are written.
        with self.autocast, torch.compiler.set_stance("force_eager"):
            logits: Tensor = self.model(**_placed(inputs, self.device), use_cache=False).logits[0]
            self.is_half = computes_in_half(self.base, self.device)
        self.model.train(was_training)
        return logits.float()

    def _agree(self, fault: str | None) -> str | None:
        if not dist.is_initialized():
            return fault
        bad = torch.tensor(float(fault is not None), device=self.device)
        dist.all_reduce(bad)
        return fault or ("wrong on another rank" if bad.item() else None)
