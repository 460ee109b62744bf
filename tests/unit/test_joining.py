"""What is wrong with a cluster's address is one line, long before Ray gives up."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from step_ray.cluster import joining
from step_ray.cluster.joining import check_cluster
from step_ray.cluster.raysetup import connected
from step_ray.config import RayConfig
from step_ray.errors import ClusterError
from tests.fakegcs import head

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ".".join(map(str, sys.version_info[:3]))
OURS = {"ray_version": ray.__version__, "python_version": PYTHON}


def fault(address):
    with pytest.raises(ClusterError) as caught:
        check_cluster(address)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nothing_listens(closed_port, scheme):
    address = f"{scheme}127.0.0.1:{closed_port}"
    line = fault(address)
    assert line.startswith(f"ray.address: {address!r}: no Ray cluster answers at ")
    assert line.endswith(
        "(Connection refused); start it, mend the address, or set ray.address=local"
    )


def test_connecting_says_the_same_and_starts_nothing(closed_port):
    address = f"127.0.0.1:{closed_port}"
    with (
        pytest.raises(ClusterError, match="no Ray cluster answers"),
        connected(RayConfig(address=address)),
    ):
        pytest.fail("joined a cluster that is not there")
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["nowhere", "host:port", ""])
def test_no_address(address):
    assert fault(address) in (
        f"ray.address: {address!r} is no address; use local, auto or HOST:PORT",
        f"ray.address: {address!r} is no address; give HOST:PORT",
    )


def test_other_versions_are_named_on_both_sides():
    with head({"ray_version": "2.9.0", "python_version": "3.9.1"}) as (address, _):
        assert fault(address) == (
            f"ray.address: {address!r}: the cluster runs Ray 2.9.0 on Python 3.9.1, this process"
            f" Ray {ray.__version__} on Python {PYTHON}; use the environment or image of the"
            " cluster"
        )


def test_a_cluster_elsewhere_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_node_ids", list)
    with head(OURS) as (address, _):
        assert fault(address).startswith(
            f"ray.address: {address!r}: this machine is no node of the cluster; submit a job"
        )


def test_a_cluster_that_fits_is_joined(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: ["a"])
    with head(OURS) as (address, _):
        check_cluster(address)


CHECK = """
import sys
from step_ray.errors import StepRayError
from step_ray.cluster.joining import check_cluster
try:
    check_cluster(sys.argv[1])
except StepRayError as exc:
    print(exc)
"""


def checked_with(address, **variables):
    """The line that a process of its own gets, because Ray reads these variables once."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent", **joining.GCS_ENVIRONMENT, **variables}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, address], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().removeprefix(f"ray.address: {address!r}: ")


SOURCES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {},
            f"the cluster wants a token; export RAY_AUTH_MODE=token and give it in {SOURCES}",
        ),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 32},
            f"the cluster refuses the token of this process; mend it in {SOURCES}",
        ),
    ],
)
def test_a_missing_or_wrong_token(variables, expected):
    with head(OURS, token="a" * 32) as (address, _):
        assert checked_with(address, **variables) == expected


def test_the_right_token_is_taken():
    versions = {"ray_version": "2.9.0", "python_version": "3.9.1"}
    with head(versions, token="a" * 32) as (address, _):
        line = checked_with(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
    assert line.startswith("the cluster runs Ray 2.9.0")


def test_a_token_path_without_a_token_is_one_line_and_not_the_end_of_the_process():
    script = (
        "from step_ray.cluster.joining import check_cluster\n"
        "from step_ray.errors import ClusterError\n"
        "try:\n    check_cluster('127.0.0.1:1')\n"
        "except ClusterError as exc:\n    print(exc)\n"
    )
    wanting = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=wanting, capture_output=True, text=True, timeout=120
    )
    assert "the cluster wants a token and there is none in RAY_AUTH_TOKEN" in done.stdout
