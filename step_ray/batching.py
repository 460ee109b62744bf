"""Batches: which examples an optimizer step trains, on which rank, in which forward pass.

Takes a folder of examples, gives a plan and the tensors of one micro-batch. The plan of an epoch is
a function of (lengths, seed, epoch) alone, so every rank knows all of it without communication and
a resumed run sees the same data. It computes no loss and knows no model.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from step_ray.errors import DataError, boundary
from step_ray.loss import num_trained_per_row, trained_positions

COLUMNS = ("input_ids", "loss_mask")
TOKENIZER_FOLDER = "tokenizer"
"""Beside the examples: the tokenizer, with the chat template, that rendered them."""
Lengths = Sequence[int] | Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """All training examples end to end; 5 bytes per token."""

    input_ids: Tensor
    """int32, all examples one after the other."""
    loss_mask: Tensor
    """bool, same length."""
    starts: Tensor
    """Index of the first token of each example."""
    lengths: Tensor
    """Tokens of each example."""
    num_trained: Tensor
    """Trained tokens of each example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The tensors of one forward pass (B rows, T positions, N trained tokens)."""

    input_ids_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on another device."""
        return MicroBatch(
            input_ids_BT=self.input_ids_BT.to(device, non_blocking=True),
            positions_N=self.positions_N.to(device, non_blocking=True),
            targets_N=self.targets_N.to(device, non_blocking=True),
        )


def load_examples(folder: Path) -> Examples:
    """Read a folder of examples into memory, its files in the order of their names.

    Raises:
        DataError: no example, an empty one, a mask of another length, no trained token, or a file
            that is not Parquet or lacks a column.
    """
    files = sorted(f for f in folder.glob("*.parquet") if not f.name.startswith("."))
    with boundary(DataError, f"examples: {str(folder)!r} cannot be read"):
        tables = [pq.read_table(file, columns=list(COLUMNS)) for file in files]
    if not any(table.num_rows for table in tables):
        raise DataError(f"examples: {str(folder)!r} holds no training example; loosen the filter")
    table = pa.concat_tables(tables)
    ids, lengths = _flatten(table["input_ids"], np.int32)
    mask, mask_lengths = _flatten(table["loss_mask"], np.bool_)
    if not torch.equal(lengths, mask_lengths) or int(lengths.min()) < 1:
        raise DataError(f"examples: {str(folder)!r} has empty rows or masks of another length")
    starts = lengths.cumsum(0) - lengths
    num_trained = num_trained_per_row(mask, starts, lengths)
    if not int(num_trained.sum()):
        raise DataError(f"examples: {str(folder)!r} has no trained token; check the loss mask")
    return Examples(
        input_ids=ids, loss_mask=mask, starts=starts, lengths=lengths, num_trained=num_trained
    )


def _flatten(column: pa.ChunkedArray, dtype: type) -> tuple[Tensor, Tensor]:
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return torch.from_numpy(values), torch.from_numpy(lengths)


def plan_epoch(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The global batches of an epoch: shuffled examples, cut where the tokens are even.

    Every example is in exactly one batch. Batches differ by at most one example's length, so the
    last one is no smaller than the others.

    Args:
        lengths: tokens of each example.
        batch_tokens: tokens of a batch, without padding, over all ranks.
        seed: seed of the run.
        epoch: number of the epoch; another one gives another order.

    Returns:
        Batches of example indices, in training order.
    """
    order = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    total = sum(lengths)
    num_batches = -(-total // batch_tokens)
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    before = 0
    for index in order:
        middle = before + lengths[index] / 2
        batches[min(int(middle * num_batches / total), num_batches - 1)].append(index)
        before += lengths[index]
    return [batch for batch in batches if batch]


def split_batch(
    batch: Sequence[int], lengths: Lengths, num_ranks: int, micro_batch_tokens: int
) -> list[list[list[int]]]:
    """Divide a global batch over ranks, and each rank's share into forward passes.

    The longest example left goes to the rank with the fewest tokens; within a rank neighbours in
    length share a forward pass, so that little is padding.

    Args:
        batch: example indices.
        lengths: tokens by example index.
        num_ranks: workers.
        micro_batch_tokens: tokens of a forward pass, padding included; an example that is longer
            goes alone.

    Returns:
        `[rank][forward pass][example]`. All ranks have the same number of passes, because FSDP2
        communicates in each; a pass may be empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(batch, key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    passes = [_cut(share, lengths, micro_batch_tokens) for share in shares]
    most = max(len(own) for own in passes)
    return [own + [[] for _ in range(most - len(own))] for own in passes]


def _cut(share: list[int], lengths: Lengths, budget: int) -> list[list[int]]:
    """Cut a share that is sorted from long to short into passes of at most `budget` tokens."""
    passes: list[list[int]] = []
    for index in share:
        if passes and lengths[passes[-1][0]] * (len(passes[-1]) + 1) <= budget:
            passes[-1].append(index)
        else:
            passes.append([index])
    return passes


def collate(examples: Examples, indices: Sequence[int]) -> MicroBatch:
    """The tensors of one forward pass, padded on the right with id 0 (never attended, see loss.py).

    No indices give a pass without trained tokens, so that a rank without data takes part.
    """
    if not indices:
        empty = torch.zeros(0, dtype=torch.long)
        ids_BT = torch.zeros(1, 2, dtype=torch.long)
        return MicroBatch(input_ids_BT=ids_BT, positions_N=empty, targets_N=empty)
    spans = [(int(examples.starts[i]), int(examples.lengths[i])) for i in indices]
    ids_BT = _pad(examples.input_ids, spans).long()
    positions_N, targets_N = trained_positions(ids_BT, _pad(examples.loss_mask, spans))
    return MicroBatch(input_ids_BT=ids_BT, positions_N=positions_N, targets_N=targets_N)


def _pad(flat: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return pad_sequence([flat[s : s + n] for s, n in spans], batch_first=True)
