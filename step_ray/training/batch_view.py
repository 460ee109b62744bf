"""What one forward pass of a training reads and learns: its documents with their mask in colour.

Takes examples and the settings of a training, gives the passes of its first epoch as text. All
that is shown is read off the tensors that the model and the loss get (batching.py); only which
untrained tokens are the agent's errors comes from the examples. It runs no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from step_ray.config import TrainConfig
from step_ray.dataset import Example
from step_ray.training.batching import Examples, MicroBatch, collate, plan_epoch, split_batch
from step_ray.training.mask_view import colour_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward pass of the first epoch."""

    step: int
    """Optimizer step, from 0."""
    rank: int
    number: int
    """Among the passes of its rank in this step, from 0."""
    indices: tuple[int, ...]
    """Its examples."""


def first_epoch(examples: Examples, config: TrainConfig, *, seed: int, packed: bool) -> list[Pass]:
    """The passes of the first epoch in the order of steps, ranks and passes; empty ones left out.

    Args:
        examples: of the training.
        config: its settings; of elastic workers, as many as there can be.
        seed: of the run.
        packed: whether examples lie end to end in one row.
    """
    lengths = examples.lengths.tolist()
    workers = config.num_workers
    num_ranks = workers if isinstance(workers, int) else max(workers)
    found = []
    for step, batch in enumerate(plan_epoch(lengths, config.batch_tokens, seed, 0)):
        shares = split_batch(batch, lengths, num_ranks, config.micro_batch_tokens, packed=packed)
        found += [
            Pass(step=step, rank=rank, number=number, indices=tuple(indices))
            for rank, share in enumerate(shares)
            for number, indices in enumerate(share)
            if indices
        ]
    return found


def view_pass(
    one: Pass,
    examples: Examples,
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    packed: bool,
) -> Iterator[Text]:
    """A line about the pass, then a line and the coloured text of each of its documents.

    Args:
        one: the pass.
        examples: what training reads.
        rows: the same examples with their ids and error masks.
        tokenizer: that of the examples.
        packed: whether they lie end to end in one row.
    """
    batch = collate(examples, one.indices, packed=packed)
    ids_BT = batch.inputs["input_ids"]
    ids, trained = ids_BT.flatten(), _trained(batch)
    num_tokens = int(examples.lengths[list(one.indices)].sum())
    yield Text(
        f"step {one.step}, rank {one.rank}, pass {one.number}: {_kind(packed)},"
        f" {len(one.indices)} documents in {ids_BT.shape[0]} x {ids_BT.shape[1]} positions,"
        f" {len(batch.positions_N)} tokens trained, {ids.numel() - num_tokens} of padding"
    )
    starts = _starts(batch, packed)
    for index, start in zip(one.indices, starts, strict=True):
        row, length = rows[index], int(examples.lengths[index])
        part = slice(start, start + length)
        flags = trained[part].tolist()
        errors = row.error_mask or (False,) * length
        place = f"positions {start} to {start + length - 1}" if packed else f"{length} tokens"
        yield Text(
            f"\nexample {index}, {row.trajectory_id} ({row.source}): {place},"
            f" {sum(flags)} trained, {sum(errors)} masked",
            "bold",
        )
        yield colour_tokens(ids[part].tolist(), flags, errors, tokenizer)


def _kind(packed: bool) -> str:
    return "packed" if packed else "padded"


def _trained(batch: MicroBatch) -> torch.Tensor:
    """Which positions of the flattened row hold a token that the loss is taken of."""
    ids = batch.inputs["input_ids"].flatten()
    trained = torch.zeros(len(ids), dtype=torch.bool)
    trained[batch.positions_N + 1] = True
    assert torch.equal(ids[batch.positions_N + 1], batch.targets_N), "targets are not the next ids"
    return trained


def _starts(batch: MicroBatch, packed: bool) -> list[int]:
    """Where each document begins in the flattened rows, as attention is told."""
    if packed:
        starts: list[int] = batch.inputs["cu_seq_lens_q"][:-1].tolist()
        return starts
    num_rows, width = batch.inputs["input_ids"].shape
    return [row * width for row in range(num_rows)]
