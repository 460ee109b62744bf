"""The line as jobs of a cluster that `ray start` made, with a token, while its machines die."""

import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray_nodes import RayNodes, blind_to, tree

from step_ray.store import read_trajectories
from step_ray.training.job import read_lines

NUM_COLLECT = 48
SETTINGS = {
    "name": "line",
    "student": {
        "init": "scratch",
        "max_length": 2048,
        "scratch": {"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    },
    "env": {"prompt": "alfworld_short", "max_steps": 12, "generator": {"size": "tiny"}},
    "tasks": {"num_expert": 8, "num_collect": NUM_COLLECT, "num_eval": 2},
    "teacher": {"max_corrections": 2},
    "train": {"num_workers": [1, 2], "epochs": 1, "batch_tokens": 4096, "checkpoint_every": 1},
    "train_arm": {"epochs": 6},
    "collect": {
        **{"num_actors": 2, "min_actors": 2, "episodes_per_actor": 2, "rows_per_shard": 2},
        **{"max_new_tokens": 24, "node_labels": {"step-ray/role": "work"}},
    },
    "dataset": {"keep": "all"},
    "arms": {"step": {"self_reflected": True}},
    "serve": {"port": 0},
}
HEAD = ("--num-cpus=0",)
"""As on Kubernetes: no work on the head."""
LONG_S = 300
"""For a busy machine."""
pytestmark = pytest.mark.slow


@pytest.fixture
def sockets():
    """A folder with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def wait_for(condition, job):
    """Poll while a job runs; what it holds."""
    deadline = time.monotonic() + LONG_S
    while not (held := condition()):
        assert job.poll() is None, log_of(job)
        assert time.monotonic() < deadline, log_of(job)
        time.sleep(0.1)
    return held


def log_of(job):
    return job.log.read_text()


def command(config, *overrides):
    return ["python", "jobs/pipeline.py", "--config", str(config), *overrides]


def collected(run):
    folder = run / "trajectories" / "collect"
    played = read_trajectories(folder) if folder.is_dir() else ()
    return Counter(t.task.task_id for t in played)


def add_worker(nodes, name):
    nodes.add(name, cpus=4, **{"step-ray/role": "work"})


def node_of(nodes, pid):
    """The node whose process this is."""
    return next(name for name, root in nodes.roots().items() if pid in tree(root))


def training(run):
    """Pid of rank 0 once a checkpoint of the arm is there."""
    work = run / "train" / "step"
    if not (work / "step" / "checkpoint_manager_snapshot.json").exists():
        return None
    return read_lines(work / "starts.jsonl")[-1]["pid"]


def test_a_node_that_does_not_see_the_folder_ends_the_job_with_its_name(sockets, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    if subprocess.run([*blind_to(runs), "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system of its own")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(runs)}))
    with RayNodes(sockets / "1", HEAD) as nodes:
        add_worker(nodes, "a")
        nodes.add("b", unseen=runs)
        job = nodes.submit("blind", *command(config))
        assert job.wait(LONG_S) == 1
        assert nodes.status("blind") == "failed"
    fault = f"step-ray: output_dir: '{runs / 'line'}' is not seen on {os.uname().nodename};"
    assert fault in log_of(job)
    assert "Traceback" not in log_of(job)
    assert list((runs / "line").iterdir()) in ([], [runs / "line" / ".lock"])


def test_a_line_of_jobs_survives_the_death_of_its_workers_and_of_its_cluster(sockets, tmp_path):
    config, run = tmp_path / "config.yaml", tmp_path / "runs" / "line"
    config.write_text(yaml.safe_dump({**SETTINGS, "output_dir": str(tmp_path / "runs")}))
    with RayNodes(sockets / "1", HEAD) as nodes:
        add_worker(nodes, "a")
        bad = nodes.submit("bad", *command(config, "train.epochs=none"))
        assert bad.wait(LONG_S) == 1
        assert nodes.status("bad") == "failed"
        assert "step-ray: train.epochs: Input should be a valid integer" in log_of(bad)
        assert "Traceback" not in log_of(bad)

        first = nodes.submit("first", *command(config))
        wait_for(lambda: 0 < collected(run).total() < NUM_COLLECT // 2, first)
    assert first.wait(LONG_S) != 0
    kept = collected(run)
    assert set(kept.values()) == {1}

    with RayNodes(sockets / "2", HEAD) as nodes:
        for name in "ab":
            add_worker(nodes, name)
        second = nodes.submit("second", *command(config))
        wait_for(lambda: collected(run).total() > kept.total(), second)
        nodes.kill("a")
        add_worker(nodes, "c")
        nodes.kill(node_of(nodes, wait_for(lambda: training(run), second)))
        assert second.wait(LONG_S) == 0, log_of(second)
        assert nodes.status("second") == "succeeded"
        again = nodes.submit("second", *command(config))
        assert again.wait(LONG_S) != 0
        assert "already exists" in log_of(again)
    told = [line for line in log_of(second).splitlines() if "again" in line or "goes on" in line]
    print(f"\n{kept.total()} of {NUM_COLLECT} kept from the first cluster", *told, sep="\n")
    assert "go on   collect" in log_of(second)
    assert set(collected(run).values()) == {1}
    assert len(collected(run)) == NUM_COLLECT
    starts = [start["step"] for start in read_lines(run / "train" / "step" / "starts.jsonl")]
    assert starts[0] == 0
    assert len(starts) > 1
    assert min(starts[1:]) > 0
