"""Which tokens carry loss, and what the loss of a step is divided by.

Takes token ids and loss masks, gives positions, targets and counts. The label shift (position t
predicts token t + 1) happens here and nowhere else. Knows no model, optimizer, rank or file.

Shape suffixes: B rows, T positions, N trained tokens of the micro-batch.

Partial-masking loss of an optimizer step: L_PM = -E sum_i delta_i log pi(t_i, a_i | e, u, tau_<i).
E is the mean over the trained tokens of the whole step, so what its micro-batches and ranks give
adds up to the loss of the step. Source: arXiv 2505.20023, partial masking.
"""

import torch
from torch import Tensor


def masked_loss(nll_sum: Tensor, num_trained: int) -> Tensor:
    """What one micro-batch adds to the loss of its step.

    Args:
        nll_sum: sum of the negative log probabilities of the micro-batch's trained tokens (those
            with delta = 1); 0 if it has none.
        num_trained: trained tokens of the whole optimizer step, over all ranks.
    """
    return nll_sum / max(num_trained, 1)


def trained_positions(input_ids_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where trained tokens are predicted, as positions in the flattened B * T, and the tokens.

    A trained token at t is predicted at t - 1; the first token of a row has no prediction and is
    never trained (see `num_trained_per_row`). The same holds for the first token of each document
    in a packed row, which the caller takes out of the mask.
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
