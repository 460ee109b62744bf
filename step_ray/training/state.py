"""The state of a training in a folder: weights, optimizer, number of steps.

Takes a `Learner`, writes and reads checkpoints. All ranks call the same functions in the same
order. It neither decides when to checkpoint nor knows where checkpoints are kept (checkpoints.py).
"""

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from step_ray.errors import RunStateError
from step_ray.training.learner import Learner

TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Checkpoints of a LoRA hold the adapter only; the frozen base comes from `init`."""


def save(learner: Learner, folder: str, step: int) -> None:
    """Write this rank's part of a checkpoint; the parts of all ranks make a whole one."""
    dcp.save({**_state(learner), "step": torch.tensor(step)}, checkpoint_id=folder)


def restore(learner: Learner, folder: str) -> int:
    """Read a checkpoint of any number of ranks; gives its number of finished steps.

    Raises:
        RunStateError: it cannot be read, or is of another model or optimizer.
    """
    state = {**_state(learner), "step": torch.tensor(0)}
    try:
        dcp.load(state, checkpoint_id=folder)
    # the first is a BaseException that holds those of the ranks
    except (CheckpointException, OSError, ValueError, RuntimeError) as exc:
        raise RunStateError(
            f"checkpoint: {folder!r} is damaged or of another training ({_cause(exc)}); delete"
            " the folder of the training, or take its model and settings"
        ) from exc
    set_state_dict(
        learner.model,
        learner.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINABLE_ONLY,
    )
    return int(state["step"])


def _cause(exc: BaseException) -> str:
    """The first sentence of what went wrong, on the first rank where it did."""
    if isinstance(exc, CheckpointException):
        exc = next(failure for failure, _ in exc.failures.values())
    line = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    # torch goes on with advice that is not for whoever has a damaged file
    return line.partition(". ")[0][:200]


def _state(learner: Learner) -> dict[str, Any]:
    model, optimizer = get_state_dict(learner.model, learner.optimizer, options=TRAINABLE_ONLY)
    return {"model": model, "optimizer": optimizer}
