"""What a training is told, and what it leaves: the job, metrics.jsonl, its result.

Takes settings and lines of numbers, gives JSON files on the shared file system. It trains nothing
and loads neither torch nor Ray, so driver, workers and report can all read it.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_ray.config import TrainConfig
from step_ray.env_config import Section
from step_ray.storage.places import mirror, shown
from step_ray.storage.remote import fetch, pull, push

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
RESULT_FILE = "train_result.json"
FAULTS_FILE = "faults.jsonl"
PREEMPTIONS_FILE = "preemptions.jsonl"
TOKENIZER_FOLDER = "tokenizer"
"""Beside the examples: the tokenizer, with the chat template, that rendered them."""
INPUTS, OUTPUTS = ("examples_dir", "validation_dir", "init"), ("output_dir", "work_dir")
PLACES = (*INPUTS, *OUTPUTS)
KEEP_S = 30.0
"""Lines reach the store behind a mirror at least so often."""


class TrainJob(Section):
    """Everything a worker needs; paths are absolute, and on a file system that all nodes share or
    in a mirror.

    It goes to Ray as plain JSON: Ray's controller unpickles it too, and would load this module and
    with it transformers for nothing.
    """

    config: TrainConfig
    examples_dir: Path
    validation_dir: Path | None = None
    init: str
    dtype: str
    output_dir: Path
    work_dir: Path
    seed: int
    name: str

    def to_nodes(self) -> dict[str, Any]:
        """Plain JSON for the workers; what is in a mirror goes by its address."""
        places = {name: shown(value) for name in PLACES if (value := getattr(self, name))}
        return self.model_dump(mode="json") | places

    @classmethod
    def on_node(cls, told: Mapping[str, Any]) -> "TrainJob":
        """The job of `to_nodes` on this node, to which its inputs are brought."""
        paths = {name: str(fetch(told[name])) for name in INPUTS if told.get(name)}
        outputs = {name: str(mirror(told[name])) for name in OUTPUTS}
        return cls.model_validate({**told, **paths, **outputs})

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
    exported_step: int = 0
    """The step whose weights were exported."""
    validation_loss: float | None = None
    error_nll: float | None = None
    """Of the exported weights, see validation.py; None: not measured."""
    tracking_faults: int = 0
    """Trackers that failed on the way; what they miss is in metrics.jsonl."""


class MetricsLog:
    """metrics.jsonl, written by rank 0: one line per optimizer step, each step once."""

    def __init__(self, work_dir: Path, done: int, start: Mapping[str, Any]) -> None:
        """Drop the lines after step `done` (they are trained again) and note this start.

        Args:
            work_dir: of the training.
            done: steps of earlier starts.
            start: what else there is to say of this start.
        """
        pull(work_dir)  # what rank 0 of an earlier start has left, perhaps on another node
        work_dir.mkdir(parents=True, exist_ok=True)
        self.path, self._kept_at = work_dir / METRICS_FILE, time.monotonic()
        self._faults = work_dir / FAULTS_FILE
        self._preemptions = work_dir / PREEMPTIONS_FILE
        kept = [line for line in read_lines(self.path) if line["step"] <= done]
        rewritten = self.path.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.replace(self.path)
        self._append(work_dir / STARTS_FILE, {"step": done, "pid": os.getpid(), **start})
        self.keep()

    def append(self, line: dict[str, Any]) -> None:
        """Add one step."""
        self._append(self.path, line)
        if time.monotonic() - self._kept_at > KEEP_S:
            self.keep()

    def keep(self) -> None:
        """Bring all lines, and what the trackers write, to the store behind a mirror."""
        push(self.path.parent)
        self._kept_at = time.monotonic()

    def note_preemption(self, step: int) -> None:
        """Keep that a node was about to go, and that a checkpoint of this step was written."""
        self._append(self._preemptions, {"step": step, "time": time.time()})

    def note_fault(self, text: str) -> None:
        """Keep a line about something that went wrong beside the training."""
        self._append(self._faults, {"fault": text})

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


def read_result(work_dir: Path, exported_step: int) -> TrainResult:
    """Sum up a finished training; the weights after `exported_step` are those exported."""
    lines = read_lines(work_dir / METRICS_FILE)
    last = lines[-math.ceil(len(lines) / 10) :]
    seconds = sum(line["seconds"] for line in lines)
    last_tokens = sum(line["trained_tokens"] for line in last)
    exported = next((line for line in lines if line["step"] == exported_step), {})
    return TrainResult(
        num_steps=len(lines),
        final_loss=sum(line["loss"] * line["trained_tokens"] for line in last) / last_tokens,
        trained_tokens=sum(line["trained_tokens"] for line in lines),
        seconds=seconds,
        tokens_per_s=sum(line["tokens"] for line in lines) / seconds,
        num_restarts=len(read_lines(work_dir / STARTS_FILE)) - 1,
        exported_step=exported_step,
        validation_loss=exported.get("validation_loss"),
        error_nll=exported.get("error_nll"),
        tracking_faults=len(read_lines(work_dir / FAULTS_FILE)),
    )
