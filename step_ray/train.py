"""Masked supervised fine-tuning on Ray Train: the driver's side.

Takes a folder of examples and a student, gives an exported Hugging Face folder. It checks what can
be checked before workers start, runs one `TorchTrainer`, and reports progress. What the workers
do is in training/loop.py. Ray must be initialised by the caller.
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

from step_ray.config import TrainConfig
from step_ray.errors import ConfigError, DataError, RunStateError, StepRayError, StorageError
from step_ray.storage.places import shown, url_of
from step_ray.storage.remote import exists, for_libraries, pull, tail
from step_ray.store import write_json
from step_ray.training.batching import Examples, load_examples
from step_ray.training.checkpoints import SCORE
from step_ray.training.config import TRAIN_SPEED_ONLY
from step_ray.training.faults import StopAtOwnErrors, own_error
from step_ray.training.job import METRICS_FILE, RESULT_FILE, STARTS_FILE, TrainJob, TrainResult
from step_ray.training.loop import train_loop_per_worker
from step_ray.training.model_files import fingerprint, load_config, positions_of
from step_ray.training.student import check_model, load_tokenizer, resolve_init
from step_ray.training.tracking import check_installed

Progress = Callable[[Mapping[str, Any]], None]
"""Called on the driver with the newest line of a file that a worker writes."""

POLL_S, STORE_POLL_S = 0.5, 5.0
"""Between two looks at a file, and at an object."""
STATE_FILE = "train.json"


def train(
    config: TrainConfig,
    *,
    examples_dir: Path,
    validation_dir: Path | None = None,
    init: str,
    dtype: str,
    output_dir: Path,
    work_dir: Path,
    seed: int,
    name: str,
    on_progress: Progress | None = None,
    on_start: Progress | None = None,
) -> TrainResult:
    """Fine-tune a student on masked examples; called again after a kill, it goes on.

    A finished training is not repeated: its result is read back.

    Args:
        config: settings of the training.
        examples_dir: Parquet files with `input_ids` (list<int32>) and `loss_mask` (list<bool>).
        validation_dir: held-out examples, with `error_mask` too; None: no validation.
        init: model folder or hub id to start from.
        dtype: torch type of the weights, while training and in the exported folder.
        output_dir: model folder to write, with tokenizer and train_result.json; appears whole.
        work_dir: checkpoints, metrics.jsonl, starts.jsonl; one training each. Like the other
            folders it must be visible to all nodes.
        seed: decides data order, dropout and the start of a LoRA.
        name: name of the Ray Train run; its checkpoints lie in `work_dir / name`.
        on_progress: called about twice a second while there are new steps.
        on_start: called with the line of starts.jsonl (its `layout`: how batches are made).

    Raises:
        ConfigError: `init` cannot be loaded, a tracker is not installed, or `select: best` without
            held-out examples.
        DataError: there is nothing to train on, or it was made with another tokenizer.
        RunStateError: `work_dir` or `output_dir` holds another training.
        StepRayError: the loss is not finite, or the workers failed more than `config.max_failures`
            times. Errors of step_ray in a worker are raised at once, without a restart.
    """
    job = TrainJob(
        config=config,
        examples_dir=examples_dir.resolve(),
        validation_dir=validation_dir.resolve() if validation_dir else None,
        init=resolve_init(init),
        dtype=dtype,
        output_dir=output_dir.resolve(),
        work_dir=work_dir.resolve(),
        seed=seed,
        name=name,
    )
    _check(job)
    _claim(job)
    if not _is_exported(job):
        _fit_and_tell(job, on_start, on_progress)
        pull(job.work_dir)  # what rank 0 has written
    pull(job.output_dir / RESULT_FILE)
    saved = (job.output_dir / RESULT_FILE).read_text(encoding="utf-8")
    return TrainResult(**json.loads(saved))


def _is_exported(job: TrainJob) -> bool:
    """Whether the model is there; in a store its files come one by one, the result last."""
    if url_of(job.output_dir) is None:
        return job.output_dir.exists()
    return exists(job.output_dir / RESULT_FILE)


def _fit_and_tell(job: TrainJob, on_start: Progress | None, on_progress: Progress | None) -> None:
    job.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        _progress(job.work_dir / STARTS_FILE, on_start),
        _progress(job.work_dir / METRICS_FILE, on_progress),
    ):
        _fit(job)


def _check(job: TrainJob) -> None:
    """Refuse what would fail only after hours."""
    check_installed(job.config.tracking)
    if job.config.select == "best" and job.validation_dir is None:
        raise ConfigError("train.select: 'best' needs held-out examples; hold some out, or 'last'")
    check_model(job.init, load_tokenizer(job.tokenizer_source))


def _claim(job: TrainJob) -> None:
    """Make sure that folders with earlier work belong to this very training."""
    state = _identity(job)
    path = job.work_dir / STATE_FILE
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in state if earlier.get(key) != state[key]]
        if other:
            raise RunStateError(
                f"work_dir: {shown(job.work_dir)!r} holds a training with another {other[0]}; "
                "delete it or choose another folder"
            )
        return
    if _is_exported(job):
        raise RunStateError(f"output_dir: {shown(job.output_dir)!r} exists; delete it or rename")
    write_json(path, state)


def _identity(job: TrainJob) -> dict[str, Any]:
    """What decides the trained weights, in JSON.

    A model folder is known by its weights, not by its place: a job has a copy of the shipped models
    of its own, and a run folder may lie elsewhere on another cluster.
    """
    weights = fingerprint(job.init)
    state = {
        "name": job.name,
        **({"weights of init": weights} if weights else {"init": job.init}),
        "dtype": job.dtype,
        "seed": job.seed,
        "examples": _digest(job.examples_dir, job.init),
        **job.config.model_dump(mode="json", exclude=set(TRAIN_SPEED_ONLY)),
    }
    if job.validation_dir:
        state["validation examples"] = _digest(job.validation_dir, job.init)
    return state


def _digest(folder: Path, init: str) -> str:
    """Digest of a folder of examples that the model can read.

    Raises:
        DataError: it is empty, has nothing to train, a token that the model does not know, or
            more tokens in a row than the model reads.
    """
    examples = load_examples(folder)
    _check_fits(examples, folder, init)
    digest = hashlib.sha256()
    for tensor in (examples.lengths, examples.input_ids, examples.loss_mask):
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _check_fits(examples: Examples, folder: Path, init: str) -> None:
    largest = int(examples.input_ids.max())
    size = load_config(init).get_text_config().vocab_size
    if largest >= size:
        raise DataError(
            f"examples: {str(folder)!r} has token id {largest}, but {init!r} has {size} tokens;"
            " build the dataset with the tokenizer of this model"
        )
    longest, most = int(examples.lengths.max()), positions_of(init)
    if most is not None and longest > most:
        raise DataError(
            f"examples: {str(folder)!r} has one of {longest} tokens, but {init!r} reads {most}"
            " (max_position_embeddings); lower student.max_length and build the dataset again"
        )


def _fit(job: TrainJob) -> None:
    config = job.config
    storage_path, filesystem = for_libraries(job.work_dir)
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config=job.to_nodes(),
        scaling_config=scaling_config(config),
        run_config=RunConfig(
            name=job.name,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=_checkpoint_config(config),
            callbacks=[StopAtOwnErrors()],
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as exc:
        raise _fault(exc, config.max_failures) from exc


def scaling_config(config: TrainConfig) -> ScalingConfig:
    """How many workers, what each takes, and on which nodes."""
    return ScalingConfig(
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker={
            "CPU": config.cpus_per_worker,
            **({"GPU": 1} if config.use_gpu else {}),
        },
        label_selector=config.node_labels or None,
    )


def _checkpoint_config(config: TrainConfig) -> CheckpointConfig:
    """What Ray keeps; the newest checkpoint stays in any case, because a restart needs it."""
    if config.select == "last":
        return CheckpointConfig(num_to_keep=config.keep_checkpoints)
    return CheckpointConfig(
        num_to_keep=config.keep_checkpoints,
        checkpoint_score_attribute=SCORE,
        checkpoint_score_order="min",
    )


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
    """Follow a file of JSON lines from a thread, because workers cannot call the driver."""
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
    every_s = POLL_S if url_of(path) is None else STORE_POLL_S
    while not last_look:
        last_look = done.wait(every_s)
        newest = _last_line(path)
        if newest and newest != shown:
            on_progress(json.loads(newest))
            shown = newest


def _last_line(path: Path, reach: int = 4096) -> str | None:
    """The last complete line of a file whose lines are shorter than half of `reach` bytes."""
    try:
        lines = tail(path, reach).decode("utf-8", errors="replace").split("\n")
    except (FileNotFoundError, StorageError):  # the training itself says what is wrong
        return None
    return lines[-2] if len(lines) > 1 else None
