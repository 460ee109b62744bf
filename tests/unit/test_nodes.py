"""Nodes that do not fit together are named before any work."""

from pathlib import Path

import pytest

from step_ray.cluster.nodes import (
    SAME_ON_ALL,
    NodeReport,
    check_folder,
    node_fault,
    reach_fault,
    report,
)
from step_ray.errors import ConfigError
from step_ray.storage.runinfo import versions

OURS = {"python": "3.11.7", "ray": "2.60.0", "step-ray": "0.1.0", "torch": "2.13.0+cpu"}
RUNS = Path("/data/runs/r")


def node(name, *, sees=True, **other):
    found = {**OURS, **{key.replace("_", "-"): value for key, value in other.items()}}
    return NodeReport(name=name, sees_folder=sees, versions=found, machine="m")


def test_nodes_that_fit():
    assert node_fault(RUNS, [node("a"), node("b", torch="2.13.0+cu130")], OURS) is None


def test_a_folder_that_is_not_shared():
    blind = [node(name, sees=False) for name in "abcde"]
    assert node_fault(RUNS, [node("z"), *blind], OURS) == (
        "output_dir: '/data/runs/r' is not seen on a, b, c and 2 more; all nodes need the same"
        " folder under the same path (NFS, a ReadWriteMany volume)"
    )


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"ray": "2.59.0"}, "versions: ray is 2.60.0 here and 2.59.0 on b;"),
        ({"step_ray": "0.2.0"}, "versions: step-ray is 0.1.0 here and 0.2.0 on b;"),
        ({"torch": "2.12.0"}, "versions: torch is 2.13.0+cpu here and 2.12.0 on b;"),
    ],
)
def test_version_skew(other, line):
    fault = node_fault(RUNS, [node("a"), node("b", **other)], OURS)
    assert fault == f"{line} use one image or environment on all nodes"


def test_a_package_that_a_node_lacks():
    bare = NodeReport(name="b", sees_folder=True, versions={}, machine="m")
    assert node_fault(RUNS, [bare], OURS).startswith(
        "versions: python is 3.11.7 here and none on b"
    )


def test_this_machine_reports_itself(tmp_path):
    seen = tmp_path / "note"
    assert not report(str(seen), "me").sees_folder
    seen.touch()
    mine = report(str(seen), "me")
    assert mine.sees_folder
    assert node_fault(tmp_path, [mine], versions()) is None
    assert set(SAME_ON_ALL) <= set(mine.versions)


def test_a_run_in_a_jobs_copy_of_the_working_dir_is_refused(tmp_path):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs" / "demo"
    with pytest.raises(ConfigError, match="goes with the cluster; give an absolute folder"):
        check_folder(folder)
    assert not folder.exists()
    check_folder(tmp_path / "runs" / "demo")


def test_an_agent_on_loopback_is_refused_on_several_machines_only():
    assert reach_fault("127.0.0.1", ["10.0.0.1", "10.0.0.1"]) is None
    assert reach_fault("0.0.0.0", ["10.0.0.1", "10.0.0.2"]) is None
    assert reach_fault("localhost", ["10.0.0.1", "10.0.0.2"]) == (
        "serve.host: 'localhost' is reached from one machine only, and the cluster has 2;"
        " set serve.host=0.0.0.0, and let no other network in"
    )
