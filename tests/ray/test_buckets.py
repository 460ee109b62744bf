"""The line in an object store: no node shares a folder, and a new cluster finds all there is."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from ray_nodes import tree
from storeserver import KEYS, make_bucket, s3_server

from step_ray.storage.mirror import given_path
from step_ray.store import read_json, read_trajectories

HERE = Path(__file__).parent
URL = "s3://runs/team/line"
NUM_COLLECT = 32
SETTINGS = {
    "name": "line",
    "output_dir": "s3://runs/team",
    "student": {
        "init": "scratch",
        "max_length": 2048,
        "scratch": {"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    },
    "env": {"prompt": "alfworld_short", "max_steps": 12, "generator": {"size": "tiny"}},
    "tasks": {"num_expert": 8, "num_collect": NUM_COLLECT, "num_eval": 2},
    "teacher": {"max_corrections": 2},
    "train": {
        **{"num_workers": 2, "epochs": 1, "batch_tokens": 4096, "checkpoint_every": 1},
        "node_labels": {"seat": "train"},
    },
    "train_arm": {"export": "adapter", "lora_rank": 2},
    "collect": {
        **{"num_actors": 2, "min_actors": 2, "episodes_per_actor": 2, "rows_per_shard": 2},
        **{"max_new_tokens": 24, "node_labels": {"seat": "play"}},
    },
    "dataset": {"keep": "all"},
    "arms": {"step": {"self_reflected": True}},
    "serve": {"port": 0, "node_labels": {"seat": "play"}},
}
LONG_S = 400
pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with a bucket, which the environment names."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("STEP_RAY_CACHE", str(tmp_path / "reader"))
    with s3_server(tmp_path) as server:
        make_bucket(server, "runs")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


class Driver:
    """A cluster with fresh nodes and its driver, in a process of its own."""

    def __init__(self, config, caches):
        self.log = caches.with_suffix(".log")
        path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
        with self.log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "store_driver.py"), str(config), str(caches)],
                stdout=file,
                stderr=file,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    def wait_for(self, condition):
        """Poll while it runs; gives what holds."""
        deadline = time.monotonic() + LONG_S
        while not (held := condition()):
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        return held

    def kill(self):
        """All its machines lose power."""
        for pid in tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def end(self):
        """Its exit code."""
        return self._process.wait(LONG_S)


def collected(place):
    """Episodes by task."""
    return Counter(t.task.task_id for t in read_trajectories(given_path(place)))


def shards(server):
    return {key for _, key in server.asked("PUT") if "/trajectories/collect/0" in f"/{key}"}


def test_a_run_in_a_store_outlives_its_cluster_and_needs_no_shared_folder(store, tmp_path):
    config, first, second = tmp_path / "config.yaml", tmp_path / "first", tmp_path / "second"
    config.write_text(yaml.safe_dump(SETTINGS))
    driver = Driver(config, first)
    try:
        driver.wait_for(lambda: len(shards(store)) >= 3)
    finally:
        driver.kill()
    shutil.rmtree(first)
    kept = collected(f"{URL}/trajectories/collect")
    assert set(kept.values()) == {1}
    assert 0 < kept.total() < NUM_COLLECT

    driver = Driver(config, second)
    try:
        assert driver.end() == 0, driver.log.read_text()
    finally:
        driver.kill()
    shutil.rmtree(tmp_path / "reader")
    run = given_path(URL)
    played = collected(f"{URL}/trajectories/collect")
    assert (len(played), set(played.values())) == (NUM_COLLECT, {1})
    summary = read_json(run / "stages/collect.json")["summary"]
    print(f"\nkept {kept.total()} of {NUM_COLLECT}, begun again {summary['num_restarts']}")
    assert summary["num_resumed"] == kept.total()
    assert {t.models["student"] for t in read_trajectories(run / "evaluate/step")} == {"step"}
    assert (run / "report/index.html").is_file()
    caches = {seat: names(second / seat) for seat in ("head", "play", "train")}
    assert "models/base/model.safetensors" in caches["play"]  # a replica has fetched it
    assert "models/step/adapter_model.safetensors" in caches["play"]
    assert any(name.startswith("games/") for name in caches["play"])
    assert "datasets/step/examples.parquet" in caches["train"]
    assert not any(name.startswith("trajectories/") for name in caches["play"] | caches["train"])


def names(cache):
    """What a node has of the run."""
    (root,) = cache.glob("runs/s3*/runs/team/line")
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
