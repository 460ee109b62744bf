"""The head and the loss together: the trained positions' log probabilities, a chunk at a time.

Takes a causal language model and the positions that predict a trained token, gives the sum of their
negative log probabilities. The head sees no other position, and at most a chunk of logits is alive,
forward and backward. It knows nothing of optimizers, ranks or files.

Shape suffixes: B rows, T positions, N trained tokens, C a chunk of them, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}
"""Logits alive at once, by device, where the chunk is not configured: what is small beside the
activations, and large enough that the products run at full speed."""
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names under which configs of transformers keep a factor of the logits."""
TRIAL_CHUNK = 5
TRIAL_FLOAT, TRIAL_HALF = 1e-4, 2e-2
"""Largest relative difference of the losses in a trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How logits come from hidden states, as far as it is known outside the model's forward."""

    module: nn.Module
    """The output embedding."""
    chunk: int
    """Trained positions at a time; 0: all at once, through the model's own forward."""
    scale: float = 1.0
    """Factor of the logits (Cohere, Granite)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma)."""

    def __str__(self) -> str:
        many = f"{self.chunk} trained tokens at a time" if self.chunk else "all trained tokens"
        return f"logits of {many}"

    @property
    def is_plain(self) -> bool:
        """Whether it is a matrix and at most a bias, with nothing after it."""
        return type(self.module) is nn.Linear and self.scale == 1.0 and self.softcap is None


def choose_head(
    model: nn.Module,
    base: Any,
    inputs: Mapping[str, Any],
    *,
    chunk: int,
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
) -> Head:
    """The head of a model, in chunks if they give the loss of its own forward; found by a trial.

    A model may do to its logits what no config tells; then they are made at all trained positions
    at once, by the model itself. All ranks call this together.

    Args:
        model: the model to run; sharded or not.
        base: the Hugging Face model within it.
        inputs: of a short pass, in the layout of the training.
        chunk: trained positions at a time; 0 derives it from the vocabulary.
        device: where the model is.
        autocast: in which training runs.
    """
    head = find_head(base, chunk=chunk, device=device)
    targets_N = inputs["input_ids"].flatten()
    positions_N = torch.arange(len(targets_N), device=device)
    was_training = model.training
    model.eval()
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, autocast or nullcontext():
        whole, chunked = (
            trained_nll(model, one, inputs, positions_N, targets_N)
            for one in (replace(head, chunk=0), replace(head, chunk=min(head.chunk, TRIAL_CHUNK)))
        )
        limit = TRIAL_HALF if computes_in_half(base, device) else TRIAL_FLOAT
    model.train(was_training)
    return head if abs(whole - chunked) <= limit * abs(whole) else replace(head, chunk=0)


def computes_in_half(base: Any, device: torch.device) -> bool:
    """Whether a model computes in 16 bits here: by its weights, or because autocast is on."""
    return torch.finfo(base.dtype).bits < 32 or torch.is_autocast_enabled(device.type)


def find_head(base: Any, *, chunk: int, device: torch.device) -> Head:
    """The head of a Hugging Face causal language model, as its config describes it.

    Args:
        base: the model, before or after it was wrapped for training.
        chunk: trained positions at a time; 0 derives it from the vocabulary.
        device: where the model trains.
    """
    module: nn.Module = base.get_output_embeddings()
    config = base.config.get_text_config()
    logits = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cpu"])
    scale, known = _scale(config)
    size = chunk or max(logits // config.vocab_size, 16)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(module=module, chunk=size if known else 0, scale=scale, softcap=softcap)


def _scale(config: Any) -> tuple[float, bool]:
    """The factor of the logits, and whether it could be read."""
    factor = next((v for name in MULTIPLIERS if (v := getattr(config, name, None)) is not None), 1)
    divisor = getattr(config, "logits_scaling", None) or 1
    if not isinstance(factor, int | float) or not isinstance(divisor, int | float):
        return 1.0, False
    return float(factor) / float(divisor), True


def trained_nll(
    model: nn.Module,
    head: Head,
    inputs: Mapping[str, Any],
    positions_N: Tensor,
    targets_N: Tensor,
) -> Tensor:
    """Sum of the negative log probabilities of the trained tokens.

    The head works inside the model's forward, where FSDP2 holds its whole weight and autocast is
    on. The model itself gets logits of no position.

    Args:
        model: a Hugging Face causal language model, bare or wrapped for training.
        head: its head.
        inputs: arguments of its forward: `input_ids` (B, T), and what separates documents.
        positions_N: positions in the flattened B * T that predict a trained token; may be empty.
        targets_N: the trained tokens.
    """
    kept = positions_N if not head.chunk else positions_N[:0]
    caught: list[Tensor] = []
    with _at_head(head, positions_N, targets_N, caught):
        logits: Tensor = model(**inputs, use_cache=False).logits
    assert logits.shape[:2] == (1, len(kept)), "the model does not call its output embedding"
    if not head.chunk:
        return F.cross_entropy(logits[0].float(), targets_N, reduction="sum")
    # The sum over no logits is 0; it ties the loss to the output that wrappers watch.
    return caught[0] + logits.float().sum()


@contextmanager
def _at_head(
    head: Head, positions_N: Tensor, targets_N: Tensor, caught: list[Tensor]
) -> Iterator[None]:
    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden_BTH: Tensor = args[0]
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, positions_N)
        if not head.chunk:
            return (hidden_NH.unsqueeze(0),)
        caught.append(sum_nll(head, hidden_NH, targets_N))
        return (hidden_NH[:0].unsqueeze(0),)

    handle = head.module.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def sum_nll(head: Head, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the negative log probabilities of N tokens, whose logits never exist all at once.

    A plain head in float32 goes to torch's chunked cross-entropy, which has the gradients ready
    when the logits of a chunk are there; any other is computed again in the backward pass. In half
    precision torch's would round the sum itself, and the factor of the gradients with it.
    """
    if not len(targets_N):
        return hidden_NH.float().sum()
    kind = hidden_NH.device.type
    in_float = hidden_NH.dtype == torch.float32 and not torch.is_autocast_enabled(kind)
    if head.is_plain and in_float:
        return _plain_nll(head, hidden_NH, targets_N)
    total = hidden_NH.new_zeros((), dtype=torch.float32)
    parts = zip(hidden_NH.split(head.chunk), targets_N.split(head.chunk), strict=True)
    for hidden_CH, targets_C in parts:
        total = total + checkpoint(_chunk_nll, head, hidden_CH, targets_C, use_reentrant=False)
    return total


def _plain_nll(head: Head, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    module: Any = head.module
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=head.chunk, chunking_method=None)
    return F.linear_cross_entropy(
        hidden_NH,
        module.weight,
        targets_N,
        linear_bias=module.bias,
        reduction="sum",
        options=options,
    )


def _chunk_nll(head: Head, hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
    kind = hidden_CH.device.type
    # Without the cache each chunk casts the weight for itself, so that the gradients of chunks are
    # added up in the weight's own type and not in half precision.
    half = torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False)
    with half:
        # `forward` and not the module itself: the hook of `_at_head` is on it.
        logits_CV: Tensor = head.module.forward(hidden_CH).float() * head.scale
    if head.softcap is not None:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return F.cross_entropy(logits_CV, targets_C, reduction="sum")
