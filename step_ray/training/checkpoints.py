"""Checkpoints of a training inside a Ray Train worker: when they are kept, and which is the best.

Takes a `Learner` and the line of a step, gives checkpoints to Ray Train, which keeps and deletes
them. All ranks call the same functions in the same order. What is in a checkpoint is
state.py's.
"""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode

from step_ray.training import state as train_state
from step_ray.training.config import TrainConfig
from step_ray.training.learner import Learner
from step_ray.training.validation import LOSS

SCORE = LOSS
"""Metric of a checkpoint by which the best is found; infinite where it was not validated."""
UPLOAD_TIMEOUT_S = 1800.0


def restore_latest(learner: Learner) -> int:
    """Go on from the newest checkpoint of the run; gives its steps, 0 where there is none."""
    checkpoint = ray.train.get_checkpoint()
    return 0 if checkpoint is None else _restore(learner, checkpoint)


def save(
    learner: Learner, line: dict[str, Any], config: TrainConfig, *, at_once: bool = False
) -> None:
    """Write a checkpoint of this step and hand it to Ray Train with the numbers of its line.

    Args:
        learner: what is kept.
        line: of metrics.jsonl.
        config: whether it is uploaded in the background.
        at_once: wait for the upload in any case, because a node of this training goes.
    """
    metrics = {**line, SCORE: line.get(SCORE, math.inf)}
    folder = tempfile.mkdtemp(prefix="checkpoint-")
    try:
        train_state.save(learner, folder, line["step"])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    in_background = config.checkpoint_upload == "async" and not at_once
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC
        if in_background
        else CheckpointUploadMode.SYNC,
        delete_local_checkpoint_after_upload=True,
    )


def wait_for_uploads() -> list[Any]:
    """Wait until Ray Train has taken note of all checkpoints; gives those that it keeps."""
    return list(
        ray.train.get_all_reported_checkpoints(
            consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=UPLOAD_TIMEOUT_S
        )
    )


def select(learner: Learner, config: TrainConfig, num_steps: int) -> int:
    """Load the weights that are to be exported; gives their step.

    Those of the end are in the learner already. The earlier of two equally good ones is taken.
    """
    kept = wait_for_uploads()
    if config.select == "last":
        return num_steps
    best = min(kept, key=lambda one: (one.metrics[SCORE], one.metrics["step"]))
    if best.metrics["step"] == num_steps:
        return num_steps
    return _restore(learner, best.checkpoint)


def _restore(learner: Learner, checkpoint: Any) -> int:
    with checkpoint.as_directory() as folder:
        return train_state.restore(learner, str(Path(folder)))
