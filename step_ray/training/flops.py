"""Arithmetic of a training step: how much there is, and how much a device can do.

Takes the shape of a model and the lengths of its texts, gives floating-point operations. It runs
nothing and knows neither batches nor ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PEAK_TFLOPS_BF16 = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
}
"""Dense bfloat16 peak by a part of the device's name, the first that fits (NVIDIA data sheets)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model decides the arithmetic of a step."""

    body: int
    """Weights of matrices that every token goes through."""
    trained_body: int
    """Those of `body` whose gradients are computed."""
    head: int
    """Weights of the output embedding, which only trained tokens go through."""
    trains_head: bool
    attention_width: int
    """Layers x heads x size of a head."""


def shape_of(model: Any) -> Shape | None:
    """The shape of a causal language model, whole or sharded, with or without a LoRA.

    None for a mixture of experts, of whose weights a token meets only some.
    """
    config = model.config.get_text_config()
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return None
    head, inputs = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    embeddings = {id(head), id(inputs)}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return Shape(
        body=sum(p.numel() for p in matrices),
        trained_body=sum(p.numel() for p in matrices if p.requires_grad),
        head=head.numel(),
        trains_head=head.requires_grad,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_size,
    )


def step_flops(shape: Shape, lengths: Sequence[int], num_trained: int) -> float:
    """Operations that a step needs: forward and backward, without recomputation and padding.

    A weight costs 2 operations per token forward, 2 for the gradient of its input and 2 for its own
    gradient if it is trained. Causal attention costs 2 T^2 per unit of width forward (scores and
    values, half of them masked) and twice that backward. Counting as in PaLM, arXiv 2204.02311,
    appendix B, but with causal attention and the head at trained tokens only.

    Args:
        shape: of the model.
        lengths: tokens of each text; attention does not reach over their ends.
        num_trained: tokens that the head sees.
    """
    tokens = sum(lengths)
    body = tokens * (4 * shape.body + 2 * shape.trained_body)
    head = num_trained * shape.head * (6 if shape.trains_head else 4)
    attention = 6 * shape.attention_width * sum(length * length for length in lengths)
    return float(body + head + attention)


def peak_flops(device: torch.device) -> float | None:
    """What a device can do per second in bfloat16; None: not known (all CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = (peak for part, peak in PEAK_TFLOPS_BF16.items() if part in name)
    tflops = next(peaks, None)
    return tflops * 1e12 if tflops else None
