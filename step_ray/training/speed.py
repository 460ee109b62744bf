"""How fast a training is, step by step.

Takes the line of a step, gives throughput, MFU and memory for it. It measures no time itself and
sends nothing to other ranks: memory is that of the rank that asks.
"""

import resource
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from step_ray.training.flops import peak_flops, shape_of, step_flops
from step_ray.training.learner import Learner


class Speed:
    """The model's arithmetic and the devices' peak, worked out once."""

    def __init__(self, learner: Learner) -> None:
        model = learner.model
        self._shape = shape_of(getattr(model, "module", model))
        self._device = learner.device
        peak = peak_flops(learner.device)
        self._peak = peak * learner.world_size if peak else None

    def numbers(self, line: Mapping[str, Any], lengths: Tensor) -> dict[str, float]:
        """What a line of metrics.jsonl says about speed.

        `mfu` is the share of the bfloat16 peak of all devices that the arithmetic of the step would
        take (see flops.step_flops); left out where the peak is not known. `peak_memory_mb` is in
        MiB: of the device, or on CPU of the process, since the start.

        Args:
            line: of the step, with `trained_tokens` and `seconds`.
            lengths: tokens of each text of the step.
        """
        seconds = line["seconds"]
        numbers = {
            "trained_tokens_per_s": line["trained_tokens"] / seconds,
            "peak_memory_mb": peak_memory_mb(self._device),
        }
        if self._peak and self._shape:
            flops = step_flops(self._shape, lengths.tolist(), line["trained_tokens"])
            numbers["mfu"] = flops / seconds / self._peak
        return numbers


def peak_memory_mb(device: torch.device) -> float:
    """Most memory so far, MiB: allocated on a GPU, resident of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
