"""What each Ray Train worker runs: data order, schedule, validation, metrics, export.

Takes a `TrainJob`, leaves metrics and an exported model in the run folder. The step itself
is learner.py's, checkpoints are checkpoints.py's; nothing here talks to the driver.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import ray.train.torch
import torch

from step_ray.errors import DataError, StepRayError
from step_ray.storage.remote import held
from step_ray.training import checkpoints
from step_ray.training.batching import Examples, load_examples, plan_epoch
from step_ray.training.export import export, place_model
from step_ray.training.job import RESULT_FILE, MetricsLog, TrainJob, read_result
from step_ray.training.learner import Learner
from step_ray.training.preemption import Notices
from step_ray.training.schedule import learning_rate
from step_ray.training.speed import Speed
from step_ray.training.tracking import Trackers, open_trackers
from step_ray.training.validation import LOSS, Validation


def train_loop_per_worker(loop_config: dict[str, Any]) -> None:
    """Train, checkpoint and export; resumes from the latest checkpoint of the run, if any.

    Args:
        loop_config: see `TrainJob.to_nodes`.

    Raises:
        DataError: the examples cannot be used.
        ConfigError: the model cannot be loaded, or a tracker does not answer.
        StepRayError: the loss is not finite.
    """
    job = TrainJob.on_node(loop_config)
    started = time.monotonic()
    torch.set_num_threads(job.config.cpus_per_worker)
    run = _Run(job)
    done = checkpoints.restore_latest(run.learner)
    run.open_logs(done, time.monotonic() - started)
    try:
        run.train(done)
    except StepRayError:
        # the same on all ranks: the last good checkpoint may still be on its way to the run folder
        checkpoints.wait_for_uploads()
        raise
    finally:
        run.close_logs()
    run.export()


class _Run:
    """One rank of a training."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self.examples: Examples = load_examples(job.examples_dir)
        self.learner = Learner(
            init=job.init,
            dtype=job.dtype,
            config=job.config,
            seed=job.seed,
            device=ray.train.torch.get_device(),
        )
        self.validation = Validation(job.validation_dir) if job.validation_dir else None
        self._check_vocabulary()
        self.plan = list(_plan(self.examples, job))
        self.speed = Speed(self.learner)
        self.notices = Notices()
        self.metrics: MetricsLog | None = None
        self._held = ExitStack()
        self.trackers: Trackers | None = None

    def _check_vocabulary(self) -> None:
        sets = [self.examples, *([self.validation.examples] if self.validation else [])]
        largest = max(int(examples.input_ids.max()) for examples in sets)
        if largest >= self.learner.vocab_size:
            raise DataError(
                f"examples: token id {largest} is not in the vocabulary of {self.job.init!r}"
                f" ({self.learner.vocab_size} tokens); build the dataset with its tokenizer"
            )

    def open_logs(self, done: int, setup_s: float) -> None:
        """Rank 0 writes metrics and trackers; the others are silent."""
        if self.learner.rank:
            return
        job = self.job
        start = {
            "setup_s": setup_s,
            "workers": self.learner.world_size,
            "layout": f"{self.learner.layout}; {self.learner.head}",
        }
        self._held.enter_context(held(job.work_dir.parent))
        self.metrics = MetricsLog(job.work_dir, done, start)
        opened = open_trackers(
            job.config.tracking,
            run=f"{job.work_dir.parent.parent.name}/{job.name}",
            folder=job.work_dir,
            done=done,
            settings={"init": job.init, "seed": job.seed, **job.config.model_dump(mode="json")},
        )
        self.trackers = Trackers(opened, self.metrics.note_fault)

    def close_logs(self) -> None:
        """End the trackers' runs."""
        if self.trackers:
            self.trackers.close()
        if self.metrics:
            self.metrics.keep()
        self._held.close()

    def train(self, done: int) -> None:
        """All optimizer steps after the first `done`."""
        for step in range(done, len(self.plan)):
            line = self._step(step)
            validated = self.validation is not None and self._is_due(line["step"])
            if validated:
                line |= self._validate(line["step"])
            if self.metrics and self.trackers:
                self.metrics.append(line)
                self.trackers.log(line)
            is_leaving = self.notices.has_new()
            if is_leaving or self._is_kept(line["step"], validated=validated):
                if self.metrics:
                    self.metrics.keep()  # whoever goes on from the checkpoint needs its lines
                checkpoints.save(self.learner, line, self.job.config, at_once=is_leaving)
            if is_leaving and self.metrics:
                self.metrics.note_preemption(line["step"])

    def _is_kept(self, step: int, *, validated: bool) -> bool:
        config = self.job.config
        is_candidate = validated and config.select == "best"
        return step == len(self.plan) or is_candidate or step % config.checkpoint_every == 0

    def _step(self, step: int) -> dict[str, Any]:
        """Train one global batch; gives its line (0-based epoch, 1-based step)."""
        epoch, batch = self.plan[step]
        lr = learning_rate(step, len(self.plan), self.job.config)
        line = {"step": step + 1, "num_steps": len(self.plan), "epoch": epoch, "lr": lr}
        line |= self.learner.train_batch(self.examples, batch, number=step, lr=lr)
        return line | self.speed.numbers(line, self.examples.lengths[batch])

    def _is_due(self, step: int) -> bool:
        every = self.job.config.validate_every
        return step == len(self.plan) or bool(every and step % every == 0)

    def _validate(self, step: int) -> dict[str, float]:
        assert self.validation is not None
        numbers = self.validation.measure(self.learner)
        if not math.isfinite(numbers[LOSS]):
            raise StepRayError(
                f"train: validation loss is {numbers[LOSS]} at step {step}; lower learning_rate"
            )
        return numbers

    def export(self) -> None:
        """Write the selected weights as a Hugging Face folder that appears whole."""
        job = self.job
        exported_step = checkpoints.select(self.learner, job.config, len(self.plan))
        partial = job.output_dir.with_name(f".{job.output_dir.name}.partial")
        # the lines are where rank 0 is
        result = None if self.learner.rank else read_result(job.work_dir, exported_step)
        export(self.learner, partial, job, self.examples, result)
        if result is not None:
            text = json.dumps(asdict(result), indent=2)
            (partial / RESULT_FILE).write_text(text, encoding="utf-8")
            place_model(partial, job.output_dir)


def _plan(examples: Examples, job: TrainJob) -> Iterator[tuple[int, list[int]]]:
    """Epoch and examples of every optimizer step, whatever the number of workers."""
    lengths = examples.lengths.tolist()
    for epoch in range(job.config.epochs):
        for batch in plan_epoch(lengths, job.config.batch_tokens, job.seed, epoch):
            yield epoch, batch
