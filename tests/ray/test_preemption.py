"""Nodes that are taken back with a notice: training saves itself, served replicas move."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import make_inputs

from step_ray.cluster.raysetup import ENVIRONMENT

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the driver on drained nodes prints: kind -> record."""
    folder = tmp_path_factory.mktemp("drained")
    make_inputs(folder)
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path]),
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "drain_driver.py"), str(folder)],
        **{"stdout": subprocess.PIPE, "text": True, "env": environment, "timeout": 500},
    )
    assert done.returncode == 0
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {record["kind"]: record for record in records}


def test_a_drained_training_keeps_a_checkpoint_and_goes_on_with_fewer_workers(told):
    training = told["training"]
    (notice,) = training["notices"]
    first, second = training["starts"]
    lost = training["most_before"] - second["step"]
    print(f"\nnotice at step {notice['step']}, at most {lost} steps were trained again")
    assert (first["step"], first["workers"]) == (0, 2)
    assert (second["step"], second["workers"]) == (notice["step"], 1)
    assert training["steps"] == list(range(1, training["num_steps"] + 1))


def test_served_replicas_leave_a_drained_node_and_no_request_fails(told):
    serving = told["serving"]
    print(f"\n{serving['answers']} requests, longest pause {serving['pause_s']:.1f} s")
    assert serving["before"] == ["c", "d"]
    assert serving["faults"] == []
