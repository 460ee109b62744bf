"""Evaluations as logs of Inspect AI, read back with its own library."""

import sys

import pytest
from run_folders import played

from step_ray.store import write_shard
from step_ray.types import StopReason, Usage

REASON = "inspect-ai is not installed (extra inspect)"


@pytest.fixture
def folder(tmp_path):
    """Two seeds of a task, a truncated and a broken episode, by the model gpt-x."""
    fields = {"models": {"student": "gpt-x"}}
    usage = Usage(prompt_tokens=100, completion_tokens=7, seconds=1.5)
    trajectories = [
        played("a/1", "look", "take", usage=usage, **fields),
        played("a/1", "look", seed=7, success=False, stop_reason=StopReason.ENV_DONE, **fields),
        played("b/1", "look", success=False, **fields),
        played("c/1", success=False, stop_reason=StopReason.LLM_ERROR, error="HTTP 500", **fields),
    ]
    write_shard(tmp_path / "evaluate" / "gpt-x", trajectories)
    return tmp_path / "evaluate" / "gpt-x"


@pytest.mark.parametrize("ending", [".eval", ".json"])
def test_every_episode_is_a_sample_with_its_ending(folder, tmp_path, ending):
    log_module = pytest.importorskip("inspect_ai.log", reason=REASON)
    from step_ray.data.inspect_log import write_inspect_log

    path = tmp_path / f"log{ending}"
    assert write_inspect_log(folder, path) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"evaluate", path.name}
    log = log_module.read_eval_log(str(path))
    assert (log.status, log.eval.task, log.eval.model) == ("success", "toy/train", "gpt-x")
    assert (log.eval.dataset.sample_ids, log.eval.config.epochs) == (["a/1", "b/1", "c/1"], 2)
    samples = {(s.id, s.epoch): s for s in log.samples}
    assert samples.keys() == {("a/1", 1), ("a/1", 2), ("b/1", 1), ("c/1", 1)}
    won, lost, cut, broken = (samples[key] for key in sorted(samples))
    assert [s.scores["success"].value for s in (won, lost, cut, broken)] == [1, 0, 0, 0]
    assert (cut.limit.type, cut.limit.limit, lost.limit) == ("turn", 1, None)
    assert (broken.error.message, won.error) == ("HTTP 500", None)
    assert [(m.role, m.content) for m in won.messages] == [
        ("system", "rules"),
        ("user", "room"),
        ("assistant", "Action: look"),
        ("user", "you look"),
        ("assistant", "Action: take"),
    ]
    assert [m.role for m in won.input] == ["system", "user"]
    assert won.output.completion == "Action: take"
    assert (won.model_usage["gpt-x"].total_tokens, won.total_time) == (107, 1.5)
    assert (won.metadata["actions"], lost.metadata["seed"]) == (["look", "take"], 7)


def test_the_means_are_those_of_the_report(folder, tmp_path):
    log_module = pytest.importorskip("inspect_ai.log", reason=REASON)
    from step_ray.data.inspect_log import write_inspect_log

    write_inspect_log(folder, tmp_path / "log.json")
    results = log_module.read_eval_log(str(tmp_path / "log.json")).results
    assert (results.total_samples, results.completed_samples) == (4, 3)
    success, reward = results.scores
    # over tasks: a 0.5, b 0, c 0
    assert success.metrics["mean"].value == pytest.approx(1 / 6)
    assert reward.metrics["mean"].value == pytest.approx(1 / 6)
    assert success.metrics["low"].value < 1 / 6 < success.metrics["high"].value


def test_wrong_endings_and_a_missing_library_are_one_line(folder, step_ray, monkeypatch):
    assert step_ray("data", "inspect", folder, "log.txt") == (
        2,
        "",
        ["step-ray: OUT: 'log.txt' must end in one of ['.eval', '.json']"],
    )
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    assert step_ray("data", "inspect", folder, "log.eval") == (
        2,
        "",
        ["step-ray: inspect: inspect-ai is not installed; add the extra inspect"],
    )
