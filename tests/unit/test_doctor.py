"""The doctor names what is missing and what to do; the exit code says whether a run would work."""

import socket
from pathlib import Path

import pytest
import yaml

from step_ray.cluster import doctor
from step_ray.cluster.doctor import Level
from step_ray.config import parse_config


def found(findings):
    return [(finding.level, finding.line) for finding in findings]


def config(**sections):
    return parse_config({"name": "r", **sections})


def test_this_environment_is_as_the_package_asks():
    levels = {finding.level for finding in doctor.check_packages()}
    assert levels == {Level.OK}


def test_wrong_and_missing_packages_are_named_with_the_remedy():
    wanted = ["pyyaml>=99", "no-such-package>=1", "rich", 'also-missing; extra == "vllm"']
    wrong, missing, rest = found(doctor.check_packages(wanted))
    assert wrong[0] is missing[0] is Level.FAIL
    assert wrong[1].endswith("pip install 'pyyaml>=99'")
    assert missing[1] == "no-such-package is not installed; pip install 'no-such-package>=1'"
    assert rest[1].startswith("1 as asked for")


def test_an_engine_that_the_run_does_not_use_is_only_told(monkeypatch):
    monkeypatch.setitem(doctor.REGISTRY, "webshop", "no_such_engine.module:Env")
    unused = dict(zip(doctor.REGISTRY, found(doctor.check_engines(config())), strict=True))
    assert unused["alfworld"] == (Level.OK, "alfworld")
    assert unused["webshop"] == (
        Level.WARN,
        "'webshop' needs the package 'no_such_engine'; pip install 'step-ray[webshop]'",
    )
    used = found(doctor.check_engines(config(env={"name": "webshop"})))
    assert Level.FAIL in [level for level, _ in used]


def test_storage_that_can_be_used(tmp_path):
    ((level, line),) = found(doctor.check_storage(tmp_path / "not" / "yet"))
    assert level in (Level.OK, Level.WARN)
    assert line.startswith(f"{tmp_path} can be written, locked and renamed in,")
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_written():
    ((level, line),) = found(doctor.check_storage(Path("/proc/1/runs")))
    assert level is Level.FAIL
    assert "; give another output_dir" in line


def test_no_gpu_where_the_run_needs_one_here(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor.Path, "exists", lambda self: False)
    asked = config(train={"use_gpu": True})
    ((level, line),) = found(doctor.check_devices(asked))
    assert level is Level.FAIL
    assert line.startswith("no GPU here; set train.use_gpu=false")
    elsewhere = config(train={"use_gpu": True}, ray={"address": "auto"})
    assert found(doctor.check_devices(elsewhere))[0][0] is Level.OK


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path


def token_finding():
    return found(doctor.check_authentication(config(ray={"address": "auto"})))[0]


def test_a_token_that_is_missing_open_or_fine(home, monkeypatch):
    path = home / ".ray" / "auth_token"
    assert token_finding() == (
        Level.FAIL,
        f"none in RAY_AUTH_TOKEN or {path};"
        " ray get-auth-token --generate, or the token of the cluster",
    )
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    assert token_finding() == (Level.WARN, f"others can read {path}; chmod 600 {path}")
    path.chmod(0o600)
    assert token_finding() == (Level.OK, f"in {path}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert token_finding() == (Level.OK, "in RAY_AUTH_TOKEN")


def test_a_path_without_a_token_is_not_answered_by_a_command_that_refuses_it(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    assert token_finding() == (
        Level.FAIL,
        f"none in RAY_AUTH_TOKEN or {home}/none; put the token of the cluster into {home}/none",
    )


def test_an_open_cluster_is_told(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    level, line = token_finding()
    assert level is Level.WARN
    assert line.startswith("RAY_AUTH_MODE is 'disabled': the cluster is open")


def test_a_private_cluster_needs_no_token():
    assert found(doctor.check_authentication(config()))[0][0] is Level.OK


def test_a_cluster_that_is_not_there(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    asked = config(ray={"address": address}, output_dir=str(tmp_path))
    ((level, line),) = found(doctor.check_members(asked))
    assert level is Level.FAIL
    assert line.startswith(f"ray.address: {address!r}: no Ray cluster answers at ")


def test_the_command_says_what_to_mend_and_exits_with_1(step_ray, tmp_path):
    path = tmp_path / "c.yaml"
    sections = {"name": "r", "student": {"init": "./nowhere"}, "output_dir": str(tmp_path)}
    path.write_text(yaml.safe_dump(sections))
    code, out, err = step_ray("doctor", path)
    assert (code, err) == (1, [])
    lines = out.splitlines()
    assert lines[-1].startswith("1 to mend, ")
    assert (
        "FAIL  inputs       student.init: './nowhere' holds no config.json; give a model folder"
        in lines
    )
    assert [line for line in lines if line.startswith("FAIL")] == [lines[-2]]


def test_a_machine_alone_is_looked_at_without_a_config(step_ray):
    code, out, _ = step_ray("doctor")
    assert code == 0
    assert out.splitlines()[-1].startswith("0 to mend, ")


def test_a_wrong_config_is_a_wrong_input(step_ray):
    code, _, lines = step_ray("doctor", "no.yaml")
    assert code == 2
    assert lines == ["step-ray: config: 'no.yaml' cannot be read (No such file or directory)"]


def test_a_folder_that_was_made_for_a_check_is_taken_away_again(tmp_path):
    fresh, used, kept = tmp_path / "fresh", tmp_path / "used", tmp_path / "kept"
    kept.mkdir()
    for folder in (fresh, used, kept):
        with doctor.left_as_it_was(folder):
            folder.mkdir(exist_ok=True)
            if folder is used:
                (folder / "config.yaml").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "used"]
