"""Decode steps on a GPU as recorded CUDA graphs.

A decode step of a batch is hundreds of small kernels, and starting each from Python takes longer
than running it. Takes the function that computes a step and the cache it writes to, gives the same
logits by replaying the recording of a step of that size. It chooses no token and knows no request.

Shape suffixes: B rows, V vocabulary.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from step_ray.serving.kvcache import WIDTH_STEP, BatchCache

logger = logging.getLogger(__name__)

Step: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""Tokens (B, 1) and positions (B, 1) on the device, columns seen -> logits (B, V) of the first B
rows of the cache, computed without waiting for the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    """A step of one size; it reads and writes these tensors and no others."""

    graph: torch.cuda.CUDAGraph
    tokens_B1: Tensor
    positions_B1: Tensor
    logits_BV: Tensor


class DecodeGraphs:
    """Recordings by number of rows (a power of two) and of columns, made when first needed.

    Args:
        step: computes a decode step.
        cache: that the step writes to; recordings end with the buffers they were made for.
        device: a CUDA device.
    """

    def __init__(self, step: Step, cache: BatchCache, device: torch.device) -> None:
        self._step, self._cache, self._device = step, cache, device
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._is_refused = False
        self.clear()

    def logits(self, tokens_B1: Tensor, positions_B1: Tensor, width: int) -> Tensor:
        """Logits (B, V) of the first B rows; valid until the next call.

        A model whose step cannot be recorded is told in the log once, and is computed as it is.
        Rows beyond B, up to the recorded number, compute something in column 0 of rows that nobody
        uses; whoever gets such a row writes that column first.

        Args:
            tokens_B1: newest token of each row, on CPU.
            positions_B1: its position, on CPU.
            width: columns that the rows see; the cache has room for them.
        """
        if self._version != self._cache.version:
            self.clear()
        num_rows = len(tokens_B1)
        width += -width % WIDTH_STEP
        unused = (1 << (num_rows - 1).bit_length()) - num_rows
        tokens_B1, positions_B1 = (F.pad(x, (0, 0, 0, unused)) for x in (tokens_B1, positions_B1))
        size = (num_rows + unused, width)
        recording = self._recording(size, tokens_B1, positions_B1)
        if recording is None:
            tokens_B1, positions_B1 = (x.to(self._device) for x in (tokens_B1, positions_B1))
            return self._step(tokens_B1, positions_B1, width)[:num_rows]
        recording.tokens_B1.copy_(tokens_B1)
        recording.positions_B1.copy_(positions_B1)
        recording.graph.replay()
        return recording.logits_BV[:num_rows]

    def clear(self) -> None:
        """Drop all recordings and their memory."""
        self._recordings.clear()
        self._version = self._cache.version
        # a pool of memory ends with its last recording
        self._pool: Any = None

    def _recording(
        self, size: tuple[int, int], tokens_B1: Tensor, positions_B1: Tensor
    ) -> _Recording | None:
        """That of a size, made where it is missing; None if it cannot be made."""
        if size not in self._recordings and not self._is_refused:
            try:
                self._recordings[size] = self._record(tokens_B1, positions_B1, size[1])
            except RuntimeError as exc:  # all that CUDA and torch raise: it waits for the device
                self._is_refused = True
                line = (str(exc).splitlines() or [""])[0]
                logger.warning("decode steps of this model are not recorded, so slower: %s", line)
        return self._recordings.get(size)

    def _record(self, tokens_B1: Tensor, positions_B1: Tensor, width: int) -> _Recording:
        tokens_B1, positions_B1 = tokens_B1.to(self._device), positions_B1.to(self._device)
        side, current = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        # A run before the recording lets libraries allocate what they need. It writes what the
        # replay writes again.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step(tokens_B1, positions_B1, width)
        current.wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # requests are served from a thread, beside others that may use the device
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits_BV = self._step(tokens_B1, positions_B1, width)
        return _Recording(
            graph=graph, tokens_B1=tokens_B1, positions_B1=positions_B1, logits_BV=logits_BV
        )
