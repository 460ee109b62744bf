"""What each Ray Train worker runs: data order, schedule, metrics, when to checkpoint.

Takes a `TrainJob`, leaves metrics and an exported model on the shared file system. The step itself
is learner.py's, the model's files are train_state.py's; nothing here talks to the driver.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from step_ray import train_state
from step_ray.batching import TOKENIZER_FOLDER, Examples, load_examples, plan_epoch
from step_ray.config import TrainConfig
from step_ray.env_config import Section
from step_ray.errors import DataError
from step_ray.learner import Learner

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
RESULT_FILE = "train_result.json"
FINAL_LR = 0.1
"""Learning rate at the end, as a share of its peak."""


class TrainJob(Section):
    """Everything a worker needs; paths are absolute and on a file system that all nodes share.

    It goes to Ray as plain JSON: Ray's controller unpickles it too, and would load this module and
    with it transformers for nothing.
    """

    config: TrainConfig
    examples_dir: Path
    init: str
    dtype: str
    output_dir: Path
    work_dir: Path
    seed: int
    num_threads: int

    @property
    def tokenizer_source(self) -> str:
        """The tokenizer that rendered the examples, where it is kept with them; else the model's.

        What is exported speaks exactly as it was trained, whatever `init` has for a template.
        """
        folder = self.examples_dir / TOKENIZER_FOLDER
        return str(folder) if folder.is_dir() else self.init


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished training did; kept as train_result.json in the exported folder."""

    num_steps: int
    final_loss: float
    """Mean loss per trained token over the last tenth of the steps."""
    trained_tokens: int
    """Tokens that carried loss, over all epochs."""
    seconds: float
    """Wall time of the optimizer steps, without start-up, checkpoints and export."""
    tokens_per_s: float
    """Tokens read (trained or not, without padding) per second of `seconds`."""
    num_restarts: int
    """How often the workers were started again."""


def train_loop_per_worker(loop_config: dict[str, Any]) -> None:
    """Train, checkpoint and export; resumes from the latest checkpoint of the run, if any.

    Args:
        loop_config: a `TrainJob` in JSON.

    Raises:
        DataError: the examples cannot be used.
        ConfigError: the model cannot be loaded.
        StepRayError: the loss is not finite.
    """
    job = TrainJob.model_validate(loop_config)
    started = time.monotonic()
    torch.set_num_threads(job.num_threads)
    examples = load_examples(job.examples_dir)
    device = ray.train.torch.get_device()
    learner = Learner(
        init=job.init, dtype=job.dtype, config=job.config, seed=job.seed, device=device
    )
    if int(examples.input_ids.max()) >= learner.vocab_size:
        raise DataError(f"examples: a token id is not in the vocabulary of {job.init!r}; rebuild")
    done = _restore(learner)
    setup = {"setup_s": time.monotonic() - started, "layout": f"{learner.layout}; {learner.head}"}
    metrics = MetricsLog(job.work_dir, done, setup) if learner.rank == 0 else None
    _run_steps(job, learner, examples, done, metrics)
    partial = job.output_dir.with_name(f".{job.output_dir.name}.partial")
    train_state.export(learner, partial, job.tokenizer_source)
    if learner.rank == 0:
        result = asdict(read_result(job.work_dir))
        (partial / RESULT_FILE).write_text(json.dumps(result, indent=2), encoding="utf-8")
        partial.rename(job.output_dir)


def _restore(learner: Learner) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return train_state.restore(learner, folder)


def _run_steps(
    job: TrainJob, learner: Learner, examples: Examples, done: int, metrics: "MetricsLog | None"
) -> None:
    """All optimizer steps after the first `done`; checkpoints every so many and at the end."""
    lengths = examples.lengths.tolist()
    plan = [
        (epoch, batch)
        for epoch in range(job.config.epochs)
        for batch in plan_epoch(lengths, job.config.batch_tokens, job.seed, epoch)
    ]
    for step in range(done, len(plan)):
        epoch, batch = plan[step]
        lr = learning_rate(step, len(plan), job.config)
        line = {"step": step + 1, "num_steps": len(plan), "epoch": epoch, "lr": lr}
        line |= learner.train_batch(examples, batch, number=step, lr=lr)
        if metrics:
            metrics.append(line)
        if (step + 1) % job.config.checkpoint_every == 0 or step + 1 == len(plan):
            _checkpoint(learner, line)


def _checkpoint(learner: Learner, line: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_state.save(learner, folder, line["step"])
        ray.train.report(line, checkpoint=ray.train.Checkpoint.from_directory(folder))


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to 10 % of it at the last step.

    Args:
        step: steps finished before this one.
        num_steps: steps of the whole training.
        config: `learning_rate` (the peak) and `warmup_fraction`.
    """
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup - 1, 1)
    share = FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share


class MetricsLog:
    """metrics.jsonl, written by rank 0: one line per optimizer step, each step once."""

    def __init__(self, work_dir: Path, done: int, setup: Mapping[str, Any]) -> None:
        """Drop the lines after step `done` (they are trained again) and note this start."""
        self.path = work_dir / METRICS_FILE
        kept = [line for line in read_lines(self.path) if line["step"] <= done]
        rewritten = self.path.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.replace(self.path)
        self._append(work_dir / STARTS_FILE, {"step": done, "pid": os.getpid(), **setup})

    def append(self, line: dict[str, Any]) -> None:
        """Add one step."""
        self._append(self.path, line)

    @staticmethod
    def _append(path: Path, line: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def read_result(work_dir: Path) -> TrainResult:
    """Sum up the metrics of a finished training."""
    lines = read_lines(work_dir / METRICS_FILE)
    last = lines[-math.ceil(len(lines) / 10) :]
    seconds = sum(line["seconds"] for line in lines)
    last_tokens = sum(line["trained_tokens"] for line in last)
    return TrainResult(
        num_steps=len(lines),
        final_loss=sum(line["loss"] * line["trained_tokens"] for line in last) / last_tokens,
        trained_tokens=sum(line["trained_tokens"] for line in lines),
        seconds=seconds,
        tokens_per_s=sum(line["tokens"] for line in lines) / seconds,
        num_restarts=len(read_lines(work_dir / STARTS_FILE)) - 1,
    )
