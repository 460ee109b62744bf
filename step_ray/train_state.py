"""The state of a training on disk: checkpoints while it runs, a Hugging Face folder at its end.

Takes a `Learner`, writes and reads folders. All ranks call the same functions in the same order.
It neither decides when to checkpoint nor knows where checkpoints are kept (train_loop.py).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from step_ray.learner import Learner
from step_ray.student import load_tokenizer, save_student
from step_ray.trainee import build_model

TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Checkpoints of a LoRA hold the adapter only; the frozen base comes from `init`."""


def save(learner: Learner, folder: str, step: int) -> None:
    """Write this rank's part of a checkpoint; the parts of all ranks make a whole one."""
    dcp.save({**_state(learner), "step": torch.tensor(step)}, checkpoint_id=folder)


def restore(learner: Learner, folder: str) -> int:
    """Read a checkpoint of any number of ranks; gives its number of finished steps."""
    state = {**_state(learner), "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        learner.model,
        learner.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINABLE_ONLY,
    )
    return int(state["step"])


def _state(learner: Learner) -> dict[str, Any]:
    model, optimizer = get_state_dict(learner.model, learner.optimizer, options=TRAINABLE_ONLY)
    return {"model": model, "optimizer": optimizer}


def export(learner: Learner, folder: Path, tokenizer: str) -> None:
    """Gather the weights (all ranks) and write a Hugging Face folder (rank 0), LoRA merged.

    Args:
        learner: this rank's part of the model.
        folder: what to write; an old one is removed.
        tokenizer: folder or hub id of the tokenizer that rendered the examples.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(learner.model, options=whole)
    if learner.rank:
        return
    model = build_model(learner.init, learner.dtype, learner.config, learner.seed)
    model.load_state_dict(state)
    if learner.config.lora_rank:
        model = model.merge_and_unload()
    shutil.rmtree(folder, ignore_errors=True)
    save_student(folder, model, load_tokenizer(tokenizer))
