"""The masked loss: from token ids and a loss mask to one number.

Takes tensors of one micro-batch, gives the loss. The label shift (position t predicts token t + 1)
happens here and nowhere else. Knows nothing of optimizers, ranks or files.

Shape suffixes: B rows, T positions, N trained tokens of the micro-batch, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def masked_loss(logits_NV: Tensor, targets_N: Tensor, num_trained: int) -> Tensor:
    """Partial-masking loss: L_PM = -E sum_i delta_i log pi(t_i, a_i | e, u, tau_<i).

    Only tokens with delta = 1 are handed in. E is the mean over the trained tokens of the whole
    optimizer step, so the losses of its micro-batches and ranks add up to the loss of the step.

    Args:
        logits_NV: logits at the positions that predict a trained token.
        targets_N: the trained tokens; N may be 0, which gives 0.
        num_trained: trained tokens of the whole optimizer step, over all ranks.

    Source: arXiv 2505.20023, partial masking.
    """
    nll = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    return nll / max(num_trained, 1)


def trained_positions(input_ids_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where trained tokens are predicted, as positions in the flattened B * T, and the tokens.

    A trained token at t is predicted at t - 1; the first token of a row has no prediction and is
    never trained (see `num_trained_per_row`).
    """
    rows, columns = loss_mask_BT[:, 1:].nonzero(as_tuple=True)
    return rows * input_ids_BT.shape[1] + columns, input_ids_BT[rows, columns + 1]


def num_trained_per_row(loss_mask: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Trained tokens of each row of a flat loss mask, the unpredictable first token left out.

    Args:
        loss_mask: all rows end to end, bool.
        starts: index of the first token of each row.
        lengths: tokens of each row, at least 1.
    """
    ends = torch.cat([loss_mask.new_zeros(1, dtype=torch.long), loss_mask.long().cumsum(0)])
    return ends[starts + lengths] - ends[starts + 1]


def trained_logits(
    model: nn.Module, head: nn.Module, input_ids_BT: Tensor, positions_N: Tensor
) -> Tensor:
    """Logits (N, V) at the given positions of the flattened B * T.

    The language model head sees only those positions, which saves most of the time and memory of
    a large vocabulary. No attention mask is passed: rows are padded on the right and attention is
    causal, so no trained position sees padding.

    Args:
        model: a Hugging Face causal language model, bare or wrapped for training.
        head: its output embedding.
        input_ids_BT: token ids, padded on the right with any id.
        positions_N: from `trained_positions`; may be empty.
    """
    with _only_at(head, positions_N):
        logits: Tensor = model(input_ids=input_ids_BT, use_cache=False).logits
    assert logits.shape[:2] == (1, len(positions_N)), "the model does not call its output embedding"
    return logits[0]


@contextmanager
def _only_at(head: nn.Module, positions_N: Tensor) -> Iterator[None]:
    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden_BTH: Tensor = args[0]
        return (hidden_BTH.flatten(0, 1).index_select(0, positions_N).unsqueeze(0),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
