"""Fixtures of several unit tests."""

import sys

import pytest

from step_ray.cli import main


@pytest.fixture
def step_ray(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; gives exit code, stdout and the lines of stderr."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["step-ray", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return caught.value.code or 0, out, err.splitlines()

    return run


@pytest.fixture(scope="session", autouse=True)
def _no_cluster():
    """Starts without Ray; the cluster of tests/ray lives to the end of the session."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
