"""Batches: which examples an optimizer step trains, on which rank, in which forward pass.

Takes a folder of examples, gives a plan and the tensors of one micro-batch. The plan of an epoch is
a function of (lengths, seed, epoch) alone, so every rank knows all of it without communication and
a resumed run sees the same data. It computes no loss and knows no model.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from step_ray.errors import DataError, boundary
from step_ray.training.loss import num_trained_per_row, trained_positions

COLUMNS = ("input_ids", "loss_mask")
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

    inputs: Mapping[str, Any]
    """Arguments of the model's forward: `input_ids` (B, T), and in a packed row (B is 1) what
    `packed_inputs` gives."""
    positions_N: Tensor
    targets_N: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on another device."""

        def place(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return MicroBatch(
            inputs={name: place(value) for name, value in self.inputs.items()},
            positions_N=place(self.positions_N),
            targets_N=place(self.targets_N),
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
    batch: Sequence[int],
    lengths: Lengths,
    num_ranks: int,
    micro_batch_tokens: int,
    *,
    packed: bool = False,
) -> list[list[list[int]]]:
    """Divide a global batch over ranks, and each rank's share into forward passes.

    The longest example left goes to the rank with the fewest tokens. Within a rank, padded
    neighbours in length share a forward pass, so that little is padding; packed examples fill the
    first pass that has room for them.

    Args:
        batch: example indices.
        lengths: tokens by example index.
        num_ranks: workers.
        micro_batch_tokens: tokens of a forward pass, padding included; an example that is longer
            goes alone.
        packed: the examples of a pass lie end to end in one row.

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
    divide = _fill if packed else _cut
    passes = [divide(share, lengths, micro_batch_tokens) for share in shares]
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


def _fill(share: list[int], lengths: Lengths, budget: int) -> list[list[int]]:
    """First fit of a share that is sorted from long to short: few passes, nearly full."""
    passes: list[list[int]] = []
    room: list[int] = []
    for index in share:
        fit = next((p for p, free in enumerate(room) if lengths[index] <= free), None)
        if fit is None:
            fit = len(passes)
            passes.append([])
            room.append(budget)
        passes[fit].append(index)
        room[fit] -= lengths[index]
    return passes


def padding_share(shares: Sequence[Sequence[Sequence[int]]], lengths: Lengths) -> float:
    """Share of the positions of padded passes that hold no token, over all ranks.

    Args:
        shares: from `split_batch`.
        lengths: tokens by example index.
    """
    passes = [one for share in shares for one in share if one]
    positions = sum(len(one) * max(lengths[i] for i in one) for one in passes)
    return 1 - sum(lengths[i] for one in passes for i in one) / positions


def collate(examples: Examples, indices: Sequence[int], *, packed: bool = False) -> MicroBatch:
    """The tensors of one forward pass.

    Padded: one example a row, padded on the right with id 0. No mask is needed for that: attention
    is causal, so no trained position sees padding. Packed: one row, examples end to end. No indices
    give a pass without trained tokens, so that a rank without data takes part.
    """
    spans = [(int(examples.starts[i]), int(examples.lengths[i])) for i in indices]
    inputs: dict[str, Any] = {}
    if not spans:
        ids_BT = torch.zeros(1, 2, dtype=torch.long)
        mask_BT = torch.zeros(1, 2, dtype=torch.bool)
        inputs = packed_inputs(torch.tensor([2])) if packed else {}
    elif packed:
        inputs = packed_inputs(torch.tensor([length for _, length in spans]))
        ids_BT, mask_BT = (_join(x, spans) for x in (examples.input_ids, examples.loss_mask))
        mask_BT[:, inputs["cu_seq_lens_q"][:-1].long()] = False
    else:
        ids_BT, mask_BT = (_pad(x, spans) for x in (examples.input_ids, examples.loss_mask))
    ids_BT = ids_BT.long()
    positions_N, targets_N = trained_positions(ids_BT, mask_BT)
    return MicroBatch(
        inputs={"input_ids": ids_BT, **inputs}, positions_N=positions_N, targets_N=targets_N
    )


def packed_inputs(lengths: Tensor) -> dict[str, Any]:
    """What tells a model of transformers where the documents of one row begin and end.

    Args:
        lengths: tokens of each document.

    Returns:
        `position_ids` (1, T), from 0 in each document, which all models take; and the ends of the
        documents in the form of flash attention, which spares attention layers to look for them.
    """
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    positions = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends[:-1], lengths)
    cu, longest = ends.int(), int(lengths.max())
    return {
        "position_ids": positions[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _join(flat: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([flat[s : s + n] for s, n in spans])[None]


def _pad(flat: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    return pad_sequence([flat[s : s + n] for s, n in spans], batch_first=True)
