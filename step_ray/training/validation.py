"""Validation: the loss on held-out trajectories, and how likely the model makes their errors.

Takes a folder of held-out examples and a `Learner`, gives numbers. All ranks call it together. It
changes no weight and chooses no checkpoint (loop.py).
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from step_ray.errors import DataError, boundary
from step_ray.training.batching import Examples, load_examples
from step_ray.training.learner import Learner
from step_ray.training.loss import num_trained_per_row

LOSS = "validation_loss"
ERROR_NLL = "error_nll"


class Validation:
    """The held-out examples of a training, in memory."""

    def __init__(self, folder: Path) -> None:
        """Load them.

        Raises:
            DataError: see `batching.load_examples`; or error masks of another length.
        """
        self.examples = load_examples(folder)
        self.errors = _with_errors_as_targets(self.examples, folder)

    def measure(self, learner: Learner) -> dict[str, float]:
        """The numbers of one validation, for a line of metrics.jsonl.

        `validation_loss` is the mean over the trained tokens of all held-out examples. `error_nll`
        is the mean over their masked error tokens, and is left out where there are none: the lower,
        the likelier is the model to make these errors. Read it against the unmasked ablation; both
        are measured on the same tokens.
        """
        started = time.monotonic()
        numbers = {LOSS: _mean_nll(learner, self.examples)}
        if self.errors is not None:
            numbers[ERROR_NLL] = _mean_nll(learner, self.errors)
        return {**numbers, "validation_s": time.monotonic() - started}


def _mean_nll(learner: Learner, examples: Examples) -> float:
    """Mean negative log probability of the targets, over the rows that have any."""
    rows = examples.num_trained.nonzero().flatten().tolist()
    return learner.nll(learner.passes(examples, rows)) / int(examples.num_trained.sum())


def _with_errors_as_targets(examples: Examples, folder: Path) -> Examples | None:
    """The same examples with masked error tokens in the place of trained ones."""
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    with boundary(DataError, f"validation: {str(folder)!r} cannot be read"):
        table = pq.read_table(files, columns=["error_mask"])
    values = table["error_mask"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not values.any():
        return None
    if len(values) != len(examples.loss_mask):
        raise DataError(f"validation: {str(folder)!r} has error masks of another length; rebuild")
    mask = torch.from_numpy(values.astype(np.bool_))
    num_errors = num_trained_per_row(mask, examples.starts, examples.lengths)
    return replace(examples, loss_mask=mask, num_trained=num_errors)
