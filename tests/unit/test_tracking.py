"""Trackers with their real libraries, in files; those that are not installed are skipped."""

import json
import math

import pytest
from tfevents import scalars

from step_ray.errors import ConfigError
from step_ray.training.config import TrackingConfig
from step_ray.training.tracking import Trackers, check_installed, open_trackers

LINES = [{"step": step, "loss": 1 / step, "epoch": 0} for step in (1, 2, 3)]


def track(config, folder, lines, done=0):
    """One start of a training; gives the faults."""
    opened = open_trackers(config, run="run/arm", folder=folder, done=done, settings={"lr": 0.1})
    trackers = Trackers(opened, note=lambda line: None)
    for line in lines:
        trackers.log(line)
    trackers.close()
    return trackers.faults


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    config = TrackingConfig(tensorboard=True)
    assert track(config, tmp_path, LINES) == []
    again = [{"step": 3, "loss": 9.0}, {"step": 4, "loss": 8.0}]
    assert track(config, tmp_path, again, done=2) == []

    curve = scalars(tmp_path / "tracking" / "tensorboard", "loss")
    assert curve == {1: 1.0, 2: 0.5, 3: 9.0, 4: 8.0}


def test_only_finite_numbers_are_tracked(tmp_path):
    line = {"step": 1, "loss": math.inf, "name": "x", "mfu": 0.25}
    track(TrackingConfig(tensorboard=True), tmp_path, [line])

    folder = tmp_path / "tracking" / "tensorboard"
    assert scalars(folder, "mfu") == {1: 0.25}
    assert scalars(folder, "loss") == scalars(folder, "step") == {}


def test_nothing_is_opened_or_written_by_default(tmp_path):
    assert track(TrackingConfig(), tmp_path, LINES) == []
    assert list(tmp_path.iterdir()) == []


def test_mlflow_goes_on_in_the_run_of_the_first_start(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    pytest.importorskip("sqlalchemy", reason="mlflow's store is not installed")
    config = TrackingConfig(mlflow=uri, project="trials")
    assert track(config, tmp_path, LINES) == []
    assert track(config, tmp_path, [{"step": 4, "loss": 0.125}], done=3) == []

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("trials")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {m.step: m.value for m in history} == {1: 1.0, 2: 0.5, 3: 1 / 3, 4: 0.125}
    assert (run.info.run_name, run.data.params) == ("run/arm", {"lr": "0.1"})
    assert run.info.status == "FINISHED"


def test_mlflow_without_a_server_is_a_config_error(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = TrackingConfig(mlflow="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"^train.tracking.mlflow: 'http://127.0.0.1:9' does not"):
        track(config, tmp_path, LINES)


def test_wandb_offline_writes_one_run_below_the_training(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    config = TrackingConfig(wandb="offline", project="trials")
    assert track(config, tmp_path, LINES) == []
    assert track(config, tmp_path, [{"step": 4, "loss": 0.125}], done=3) == []

    folder = tmp_path / "tracking" / "wandb"
    run_id = (folder / "run_id").read_text()
    files = sorted(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size > 200 for file in files)


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path):
    class Broken:
        name = "broken"

        def log(self, step, numbers):
            raise TimeoutError("no answer\nfor long")

        def close(self):
            raise AssertionError("closed although it is off")

    [good] = open_trackers(
        TrackingConfig(tensorboard=True), run="r", folder=tmp_path, done=0, settings={}
    )
    notes = []
    trackers = Trackers([Broken(), good], notes.append)
    for line in LINES:
        trackers.log(line)
    trackers.close()

    assert notes == ["tracking: broken failed and is off (TimeoutError: no answer)"]
    assert trackers.faults == notes
    assert len(scalars(tmp_path / "tracking" / "tensorboard", "loss")) == 3


def test_a_missing_library_is_named_with_its_key_before_any_work(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError) as caught:
        check_installed(TrackingConfig(wandb="offline"))
    assert str(caught.value) == (
        "train.tracking.wandb: 'wandb' is not installed; pip install 'step-ray[tracking]' or turn"
        " it off"
    )


def test_the_settings_are_json_that_trackers_can_show():
    assert json.loads(TrackingConfig(mlflow="x").model_dump_json())["mlflow"] == "x"
