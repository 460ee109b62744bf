"""The run folder: what is done, what has changed, and who is working in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from step_ray.errors import DataError, RunStateError
from step_ray.storage.runfolder import DONE, STARTED, Change, RunFolder, fingerprint

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"train": {"epochs": 3, "lr": 0.1}, "seeds": (0, 1), "path": Path("a")}


def finished(path, stage="train:base"):
    folder = RunFolder(path)
    folder.begin(stage, SETTINGS)
    folder.finish(stage, SETTINGS, {"loss": 0.5}, seconds=2.0)
    return folder


def test_a_stage_that_was_never_begun_has_no_state(tmp_path):
    folder = RunFolder(tmp_path)
    assert (folder.state("tasks").status, folder.digest("tasks")) == (None, "")
    assert folder.changes("tasks", SETTINGS) == []


def test_a_stage_is_started_and_then_done_with_its_summary(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin("train:base", SETTINGS)
    assert (folder.state("train:base").status, folder.state("train:base").summary) == (STARTED, {})
    folder.finish("train:base", SETTINGS, {"loss": 0.5}, seconds=2.0)
    assert folder.state("train:base").status == DONE
    assert folder.state("train:base").summary == {"loss": 0.5}
    assert RunFolder(tmp_path).state("train:base").status == DONE


def test_stages_of_two_models_do_not_mix(tmp_path):
    folder = finished(tmp_path)
    assert folder.state("train:step").status is None


def test_the_same_settings_are_no_change(tmp_path):
    folder = finished(tmp_path)
    same = {"path": Path("a"), "seeds": [0, 1], "train": {"lr": 0.1, "epochs": 3}}
    assert folder.changes("train:base", same) == []
    assert folder.digest("train:base") == fingerprint(same)


def test_a_change_names_key_old_and_new_value(tmp_path):
    changed = {**SETTINGS, "train": {"epochs": 4, "lr": 0.1}, "seeds": (0,)}
    assert [str(change) for change in finished(tmp_path).changes("train:base", changed)] == [
        "train.epochs was 3, is 4",
        "seeds was [0, 1], is [0]",
    ]


def test_a_key_that_came_or_went_is_a_change(tmp_path):
    changed = {**SETTINGS, "train": {"epochs": 3, "decay": 1}}
    assert [str(change) for change in finished(tmp_path).changes("train:base", changed)] == [
        "train.lr was 0.1, is None",
        "train.decay was None, is 1",
    ]


@pytest.mark.parametrize(
    ("old", "new", "rises"),
    [(1, 2, True), (2, 1, False), (1, None, True), (None, 1, False), (0.5, 0.75, True)],
)
def test_a_limit_is_raised_or_lifted(old, new, rises):
    assert Change(key="x", old=old, new=new).is_rise is rises


def test_what_is_set_aside_keeps_its_place_and_the_stage_is_undone(tmp_path):
    folder = finished(tmp_path)
    for kind in ("models", "train"):
        (tmp_path / kind / "base").mkdir(parents=True)
        (tmp_path / kind / "base" / "x").write_text(kind)
    outputs = [tmp_path / "models/base", tmp_path / "train/base", tmp_path / "not/there"]
    folder.set_aside("train:base", outputs)
    assert folder.state("train:base").status is None
    assert not any(output.exists() for output in outputs)
    (kept,) = (tmp_path / "replaced").iterdir()
    assert kept.name.endswith("-train.base")
    files = {str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file()}
    assert files == {"models/base/x", "train/base/x", "stages/train.base.json"}
    assert (kept / "models/base/x").read_text() == "models"


def test_a_broken_record_is_named(tmp_path):
    folder = finished(tmp_path)
    (tmp_path / "stages" / "train.base.json").write_text("{")
    with pytest.raises(DataError, match=r"train.base.json': not valid JSON"):
        folder.state("train:base")


LOCK = """
import sys
from pathlib import Path
from step_ray.errors import RunStateError
from step_ray.storage.runfolder import RunFolder
try:
    with RunFolder(Path(sys.argv[1])).locked():
        print("locked", flush=True)
        sys.stdin.read()
except RunStateError as exc:
    print(exc, flush=True)
"""


def another_process(path):
    return subprocess.Popen(
        [sys.executable, "-c", LOCK, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process):
    return process.stdout.readline().strip()


def test_a_second_process_is_refused_while_the_first_works(tmp_path):
    with RunFolder(tmp_path).locked(), another_process(tmp_path) as second:
        assert first_line(second) == (
            f"run folder '{tmp_path}' is in use by another step-ray; wait or stop it"
        )
        second.stdin.close()
    with another_process(tmp_path) as third:
        assert first_line(third) == "locked"
        third.stdin.close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    with another_process(tmp_path) as first:
        assert first_line(first) == "locked"
        with pytest.raises(RunStateError), RunFolder(tmp_path).locked():
            pass
        first.kill()
    with RunFolder(tmp_path).locked():
        pass
