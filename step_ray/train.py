"""Masked supervised fine-tuning on Ray Train: the driver's side.

Takes a folder of examples and a student, gives an exported Hugging Face folder. It checks what can
be checked before workers start, runs one `TorchTrainer`, and reports progress. What the workers
do is in train_loop.py. Ray must be initialised by the caller.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer

from step_ray.batching import load_examples
from step_ray.config import TrainConfig
from step_ray.errors import RunStateError, StepRayError
from step_ray.student import check_model, load_tokenizer, resolve_init
from step_ray.train_faults import StopAtOwnErrors, own_error
from step_ray.train_loop import (
    METRICS_FILE,
    RESULT_FILE,
    TrainJob,
    TrainResult,
    train_loop_per_worker,
)

Progress = Callable[[Mapping[str, Any]], None]
"""Called on the driver with the newest line of metrics.jsonl."""

POLL_S = 0.5
STATE_FILE = "train.json"
RESUMABLE = {
    "num_workers",
    "use_gpu",
    "strategy",
    "micro_batch_tokens",
    "packing",
    "loss_chunk",
    "gradient_checkpointing",
    "checkpoint_every",
    "max_failures",
}
"""Fields of `train` that may change between a killed training and its continuation."""


def train(
    config: TrainConfig,
    *,
    examples_dir: Path,
    init: str,
    dtype: str,
    output_dir: Path,
    work_dir: Path,
    seed: int,
    name: str,
    cpus_per_worker: int = 1,
    on_progress: Progress | None = None,
) -> TrainResult:
    """Fine-tune a student on masked examples; called again after a kill, it goes on.

    A finished training is not repeated: its result is read back.

    Args:
        config: settings of the training.
        examples_dir: Parquet files with `input_ids` (list<int32>) and `loss_mask` (list<bool>).
        init: model folder or hub id to start from.
        dtype: torch type of the weights, while training and in the exported folder.
        output_dir: model folder to write, with tokenizer and train_result.json; appears whole.
        work_dir: checkpoints, metrics.jsonl, starts.jsonl; one training each. Like the other
            folders it must be visible to all nodes.
        seed: decides data order, dropout and the start of a LoRA.
        name: name of the Ray Train run; its checkpoints lie in `work_dir / name`.
        cpus_per_worker: CPUs and torch threads of a worker.
        on_progress: called about twice a second while there are new steps.

    Raises:
        ConfigError: `init` cannot be loaded, or its vocabulary is smaller than the tokenizer's.
        DataError: there is nothing to train on.
        RunStateError: `work_dir` or `output_dir` holds another training.
        StepRayError: the loss is not finite, or the workers failed more than `config.max_failures`
            times. Errors of step_ray in a worker are raised at once, without a restart.
    """
    job = TrainJob(
        config=config,
        examples_dir=examples_dir.resolve(),
        init=resolve_init(init),
        dtype=dtype,
        output_dir=output_dir.resolve(),
        work_dir=work_dir.resolve(),
        seed=seed,
        num_threads=cpus_per_worker,
    )
    check_model(job.init, load_tokenizer(job.tokenizer_source))
    _claim(job, name)
    if not job.output_dir.exists():
        job.output_dir.parent.mkdir(parents=True, exist_ok=True)
        with _progress(job.work_dir / METRICS_FILE, on_progress):
            _fit(job, name, cpus_per_worker)
    saved = (job.output_dir / RESULT_FILE).read_text(encoding="utf-8")
    return TrainResult(**json.loads(saved))


def _claim(job: TrainJob, name: str) -> None:
    """Make sure that folders with earlier work belong to this very training."""
    state = _identity(job, name)
    path = job.work_dir / STATE_FILE
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in state if earlier.get(key) != state[key]]
        if other:
            raise RunStateError(
                f"work_dir: {str(job.work_dir)!r} holds a training with another {other[0]}; "
                "delete it or choose another folder"
            )
        return
    if job.output_dir.exists():
        raise RunStateError(f"output_dir: {str(job.output_dir)!r} exists; delete it or rename")
    job.work_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
    partial.replace(path)


def _identity(job: TrainJob, name: str) -> dict[str, Any]:
    """What decides the trained weights, in JSON."""
    examples = load_examples(job.examples_dir)
    digest = hashlib.sha256()
    for tensor in (examples.lengths, examples.input_ids, examples.loss_mask):
        digest.update(tensor.numpy().data)
    return {
        "name": name,
        "init": job.init,
        "dtype": job.dtype,
        "seed": job.seed,
        "examples": digest.hexdigest(),
        **job.config.model_dump(mode="json", exclude=RESUMABLE),
    }


def _fit(job: TrainJob, name: str, cpus_per_worker: int) -> None:
    config = job.config
    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})}
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(job.work_dir),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[StopAtOwnErrors()],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as exc:
        raise _fault(exc, config.max_failures) from exc


def _fault(exc: TrainingFailedError, max_failures: int) -> StepRayError:
    """The error that a worker raised, if it is ours; else one line about its failure."""
    failures = getattr(exc, "worker_failures", {})
    own = own_error([*failures.values(), getattr(exc, "controller_failure", exc)])
    if own is not None:
        return own
    failure = next(iter(failures.values()), exc)
    cause = getattr(failure, "_base_exc", failure)
    line = " ".join(str(cause).split())[:300]
    return StepRayError(
        f"train: workers failed more than {max_failures} times (train.max_failures); "
        f"run again to go on from the last checkpoint ({type(cause).__name__}: {line})"
    )


@contextmanager
def _progress(path: Path, on_progress: Progress | None) -> Iterator[None]:
    """Follow metrics.jsonl from a thread, because workers cannot call the driver."""
    if on_progress is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, on_progress, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(path: Path, on_progress: Progress, done: threading.Event) -> None:
    shown: str | None = None
    last_look = False
    while not last_look:
        last_look = done.wait(POLL_S)
        newest = _last_line(path)
        if newest and newest != shown:
            on_progress(json.loads(newest))
            shown = newest


def _last_line(path: Path, reach: int = 4096) -> str | None:
    """The last complete line of a file whose lines are shorter than half of `reach` bytes."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - reach, 0))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return lines[-2] if len(lines) > 1 else None
