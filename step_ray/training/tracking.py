"""Trackers: where metrics go beside metrics.jsonl.

Takes numbers by step, gives them to TensorBoard, MLflow or Weights & Biases, whose libraries are
loaded only when asked for. A training that goes on after a kill goes on in the same run of a
tracker. It decides nothing about what is measured.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from step_ray.errors import ConfigError, boundary
from step_ray.training.config import TrackingConfig

FOLDER = "tracking"
"""Beside metrics.jsonl: the ids of the trackers' runs, and what they keep themselves."""


class Tracker(Protocol):
    """One open run of one tracker."""

    name: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of one step."""

    def close(self) -> None:
        """End the run; what was logged is written."""


class Trackers:
    """All trackers of a training. One that fails is left out from then on, and says so.

    Attributes:
        faults: One line for each tracker that failed.
    """

    def __init__(self, trackers: Sequence[Tracker], note: Callable[[str], None]) -> None:
        """Take open trackers; `note` is called with the line of a fault."""
        self._open = list(trackers)
        self._note = note
        self.faults: list[str] = []

    def log(self, line: Mapping[str, Any]) -> None:
        """Record the numbers of a line of metrics.jsonl; what is no finite number is left out."""
        numbers = {
            key: float(value)
            for key, value in line.items()
            if isinstance(value, int | float) and math.isfinite(value) and key != "step"
        }
        for tracker in list(self._open):
            self._try(tracker, partial(tracker.log, line["step"], numbers))

    def close(self) -> None:
        """Close all; safe to call twice."""
        for tracker in list(self._open):
            self._try(tracker, tracker.close)
        self._open.clear()

    def _try(self, tracker: Tracker, call: Callable[[], None]) -> None:
        # any library, any network: a curve that cannot be drawn must not stop a training
        try:
            call()
        except Exception as exc:
            self._open.remove(tracker)
            text = (str(exc).splitlines() or [""])[0]
            fault = f"tracking: {tracker.name} failed and is off ({type(exc).__name__}: {text})"
            self.faults.append(fault)
            self._note(fault)


def open_trackers(
    config: TrackingConfig, *, run: str, folder: Path, done: int, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Open what is configured.

    Args:
        config: which ones.
        run: name of the run in them.
        folder: folder of the training; ids and files go below it.
        done: steps that stay; a tracker that can do so forgets later ones.
        settings: of the training, shown beside its curves.

    Raises:
        ConfigError: a library is not installed, or a tracker does not answer.
    """
    folder = folder / FOLDER
    opened: list[Tracker] = []
    if config.tensorboard:
        opened.append(_TensorBoard(folder / "tensorboard", done))
    if config.mlflow:
        opened.append(_MLflow(config, run, folder / "mlflow_run", settings))
    if config.wandb != "off":
        opened.append(_WandB(config, run, folder / "wandb", settings))
    return opened


def check_installed(config: TrackingConfig) -> None:
    """Refuse a tracker whose library is missing, before any work.

    Raises:
        ConfigError: see above.
    """
    wanted = {
        "tensorboard": config.tensorboard,
        "mlflow": bool(config.mlflow),
        "wandb": config.wandb != "off",
    }
    for key, is_wanted in wanted.items():
        if is_wanted:
            _load(key)


def _load(key: str) -> Any:
    module = {"tensorboard": "tensorboardX"}.get(key, key)
    try:
        return import_module(module)
    except ImportError as exc:
        raise ConfigError(
            f"train.tracking.{key}: {module!r} is not installed; pip install 'step-ray[tracking]'"
            " or turn it off"
        ) from exc


class _TensorBoard:
    """Event files, through the writer that comes with Ray Train."""

    name = "tensorboard"

    def __init__(self, folder: Path, done: int) -> None:
        writer = _load(self.name).SummaryWriter
        # purge_step hides what a killed worker wrote after the checkpoint; files are read in the
        # order of their names, which are unique to the second only
        self._writer = writer(
            str(folder),
            purge_step=done + 1 if done else None,
            filename_suffix=f".{time.time_ns()}",
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A run of an MLflow server or store; its id is kept, so that a restart goes on in it."""

    name = "mlflow"

    def __init__(
        self, config: TrackingConfig, run: str, id_file: Path, settings: Mapping[str, Any]
    ) -> None:
        mlflow = _load(self.name)
        with boundary(ConfigError, f"train.tracking.mlflow: {config.mlflow!r} does not answer"):
            # the client, not the fluent calls: those keep the active run in globals
            self._client = mlflow.MlflowClient(tracking_uri=config.mlflow)
            self._run_id = _kept(id_file, lambda: self._create(config.project, run, settings))
        self._metric = mlflow.entities.Metric

    def _create(self, project: str, run: str, settings: Mapping[str, Any]) -> str:
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        run_id = str(self._client.create_run(experiment, run_name=run).info.run_id)
        for key, value in settings.items():
            self._client.log_param(run_id, key, str(value)[:500])
        return run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        metrics = [self._metric(key, value, 0, step) for key, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _WandB:
    """A run of Weights & Biases, online or in files that `wandb sync` sends later."""

    name = "wandb"

    def __init__(
        self, config: TrackingConfig, run: str, folder: Path, settings: Mapping[str, Any]
    ) -> None:
        wandb = _load(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        with boundary(ConfigError, f"train.tracking.wandb: {config.wandb!r} cannot be opened"):
            self._run = wandb.init(
                project=config.project,
                name=run,
                id=_kept(folder / "run_id", lambda: os.urandom(8).hex()),
                resume="allow",
                mode=config.wandb,
                dir=str(folder),
                config=dict(settings),
            )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _kept(file: Path, make: Callable[[], str]) -> str:
    """The text of a file, made once."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(make(), encoding="utf-8")
        partial.replace(file)
    return file.read_text(encoding="utf-8")
