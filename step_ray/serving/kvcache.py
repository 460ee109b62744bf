"""Keys and values of a running batch, and of past prompts for reuse.

`BatchCache` is what the model writes to and reads from; `PrefixCache` remembers rows of it by their
token ids. Neither ever runs the model.

Shape suffixes: B rows, T new tokens. Keys and values are [rows, heads, columns, dim].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

WIDTH_STEP = 256
"""Columns are allocated in multiples of this."""

Layers = list[tuple[torch.Tensor, ...]]
"""Keys and values per layer of one row, each [heads, length, dim]."""


class _BatchLayer(CacheLayerMixin):
    """One layer of a `BatchCache`, which says where to write and what may be seen."""

    def __init__(self, cache: "BatchCache") -> None:
        super().__init__()
        self._cache = cache
        self.states: tuple[torch.Tensor, ...] = ()
        """Keys and values; empty until the first pass shows their shape and type."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the cache's present size; what was held is kept."""
        old_states = self.states
        # zeros, not empty: a masked NaN would still poison the attention's sum
        self.states = tuple(
            new.new_zeros(self._cache.num_rows, new.shape[1], self._cache.width, new.shape[3])
            for new in (key_states, value_states)
        )
        for state, old in zip(self.states, old_states, strict=bool(old_states)):
            state[: old.shape[0], :, : old.shape[2]] = old
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new states [B, heads, T, dim] at their columns; give all that may be seen."""
        if not self.states:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.states
        keys[self._cache.written] = key_states.transpose(1, 2)
        values[self._cache.written] = value_states.transpose(1, 2)
        return keys[self._cache.seen], values[self._cache.seen]

    def get_seq_length(self) -> int:
        """Zero: rows differ in length, so the caller always passes positions and mask."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the mask."""
        return self._cache.seen[2].stop, 0

    def get_max_length(self) -> int:
        """Columns allocated."""
        return self._cache.width


class BatchCache(Cache):
    """The rows of a running batch. Each starts at column 0 and has its own length.

    What an earlier row left in a column is harmless: a query at position p sees columns 0..p only,
    and its own row has written all of them.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_rows = self.width = 0
        self.written: tuple[Any, ...] = ()
        """Index of the states that the next pass computes: rows [B, 1], heads, columns [B, T]."""
        self.seen: tuple[slice, slice, slice] = (slice(0), slice(None), slice(0))
        """Index of the states that the next pass attends to."""
        self._layers = [_BatchLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))

    def reserve(self, num_rows: int, width: int) -> None:
        """Make room for so many rows and columns; what the buffers hold is kept."""
        if num_rows <= self.num_rows and width <= self.width:
            return
        # rows join one by one, so their number is doubled
        self.num_rows = max(self.num_rows, 1 << (num_rows - 1).bit_length())
        self.width = max(self.width, -(-width // WIDTH_STEP) * WIDTH_STEP)
        for layer in self._layers:
            if layer.states:
                layer.lazy_initialization(*layer.states)

    def free(self) -> None:
        """Let the buffers go; rows have to be reserved anew."""
        self.num_rows = self.width = 0
        for layer in self._layers:
            layer.states = ()

    def aim(self, first_row: int, positions_BT: torch.Tensor, width: int) -> None:
        """Say what the next pass computes: B rows from `first_row` on, seeing `width` columns."""
        end_row = first_row + len(positions_BT)
        rows = torch.arange(first_row, end_row, device=positions_BT.device)
        self.written = (rows[:, None], slice(None), positions_BT)
        self.seen = (slice(first_row, end_row), slice(None), slice(0, width))

    def load(self, row: int, layers: Layers, length: int) -> None:
        """Put the first `length` columns of a remembered prompt (empty: none) into a row."""
        for layer, remembered in zip(self._layers, layers, strict=bool(layers)):
            for state, old in zip(layer.states, remembered, strict=True):
                state[row, :, :length] = old[:, :length]

    def copy_row(self, row: int, length: int) -> Layers:
        """The first `length` columns of a row, in tensors of their own."""
        return [
            tuple(state[row, :, :length].clone() for state in layer.states)
            for layer in self._layers
        ]

    def move(self, source: int, target: int, length: int) -> None:
        """Overwrite row `target` with the first `length` columns of row `source`."""
        for layer in self._layers:
            for state in layer.states:
                state[target, :, :length] = state[source, :, :length]


@dataclass(slots=True, eq=False)
class _Entry:
    ids: np.ndarray
    layers: Layers
    num_bytes: int


class PrefixCache:
    """Keys and values of past prompts, bounded in bytes; the least recently used go first.

    An entry is used exactly as far as its token ids equal the new prompt's, so it cannot be wrong.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: list[_Entry] = []
        """Least recently used first."""

    def longest(self, ids: Sequence[int]) -> tuple[int, Layers]:
        """Length of the longest remembered prefix of `ids`, and the layers that hold it."""
        wanted = np.asarray(ids)
        best, best_length = None, 0
        for entry in reversed(self._entries):
            length = _common_prefix(entry.ids, wanted)
            if length > best_length:
                best, best_length = entry, length
        if best is None:
            return 0, []
        self._entries.remove(best)
        self._entries.append(best)
        return best_length, best.layers

    def add(self, ids: Sequence[int], layers: Layers) -> None:
        """Remember the keys and values of `ids`; an entry that `ids` continues is dropped."""
        new = np.asarray(ids)
        for entry in [e for e in self._entries if _common_prefix(e.ids, new) == len(e.ids)]:
            self._drop(entry)
        num_bytes = sum(state.nbytes for layer in layers for state in layer)
        self._entries.append(_Entry(new, layers, num_bytes))
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(self._entries[0])

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self.num_bytes -= entry.num_bytes


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size
