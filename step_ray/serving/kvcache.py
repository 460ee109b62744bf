"""Keys and values of a running batch, and of past prompts for reuse.

`BatchCache` is what the model writes to and reads from; `PrefixCache` remembers rows of it by their
token ids. Neither ever runs the model.

Shape suffixes: B rows, T new tokens. Keys and values are [rows, heads, columns, dim].
"""

from bisect import bisect, insort
from collections import OrderedDict
from collections.abc import Sequence
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
        self.version = 0
        """Counts how often the buffers were replaced by others."""
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
        self.version += 1
        for layer in self._layers:
            if layer.states:
                layer.lazy_initialization(*layer.states)

    def free(self) -> None:
        """Let the buffers go; rows have to be reserved anew."""
        self.num_rows = self.width = 0
        self.version += 1
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


class PrefixCache:
    """Keys and values of past prompts, bounded in bytes; the least recently used go first.

    An entry is used exactly as far as its token ids equal the new prompt's, so it cannot be wrong.
    No entry continues another one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._layers: OrderedDict[bytes, Layers] = OrderedDict()
        """By the key of the token ids, least recently used first."""
        self._keys: list[bytes] = []
        """Sorted, so that what shares most with a prompt stands beside the prompt's place."""

    def longest(self, ids: Sequence[int]) -> tuple[int, Layers]:
        """Length of the longest remembered prefix of `ids`, and the layers that hold it."""
        wanted = _key(ids)
        place = bisect(self._keys, wanted)
        beside = self._keys[max(0, place - 1) : place + 1]
        length, best = max(((_common_prefix(key, wanted), key) for key in beside), default=(0, b""))
        if length == 0:
            return 0, []
        self._layers.move_to_end(best)
        return length, self._layers[best]

    def add(self, ids: Sequence[int], layers: Layers) -> None:
        """Remember the keys and values of `ids`; an entry that `ids` continues is dropped."""
        new = _key(ids)
        place = bisect(self._keys, new)
        if place < len(self._keys) and self._keys[place].startswith(new):
            self._layers.move_to_end(self._keys[place])  # it holds as much, and more
            return
        if place and new.startswith(self._keys[place - 1]):
            self._drop(self._keys[place - 1])
        insort(self._keys, new)
        self._layers[new] = layers
        self.num_bytes += _num_bytes(layers)
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._layers)))

    def clear(self) -> None:
        """Forget everything."""
        self._layers.clear()
        self._keys.clear()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._keys)

    def _drop(self, key: bytes) -> None:
        del self._keys[bisect(self._keys, key) - 1]
        self.num_bytes -= _num_bytes(self._layers.pop(key))


def _key(ids: Sequence[int]) -> bytes:
    """Bytes that sort as the ids do: four per id, the highest first."""
    return np.asarray(ids, dtype=">u4").tobytes()


def _common_prefix(a: bytes, b: bytes) -> int:
    """The number of ids that two keys begin with in common."""
    size = min(len(a), len(b)) // 4
    differs = np.frombuffer(a, np.uint32, size) != np.frombuffer(b, np.uint32, size)
    return int(differs.argmax()) if differs.any() else size


def _num_bytes(layers: Layers) -> int:
    return sum(state.nbytes for layer in layers for state in layer)
