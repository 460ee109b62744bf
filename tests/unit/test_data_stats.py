"""`step-ray data`: counts add up, and each command says what became of every record."""

import json

import pytest
from builders import make_step, make_task, make_trajectory

from step_ray.data.stats import KeepRules, Lengths, set_stats
from step_ray.store import write_shard
from step_ray.training.masking import LOW_REWARD, NOT_SUCCESSFUL, NOTHING_TRAINED, TOO_LONG
from step_ray.training.recipe import DatasetConfig
from step_ray.types import StepKind, StopReason, Verdict, VerdictLabel

NO_OP = Verdict(label=VerdictLabel.ERROR, error_type="no_op")
ERROR = make_step("Action: go", "nothing", StepKind.ERROR, verdict=NO_OP)
FIX = make_step("Action: take", "mug", StepKind.CORRECTION, index=1)
ACT = make_step("Action: look", "desk")


def trajectories():
    """Two of type a, one of type b; the last one fails."""
    return [
        make_trajectory(ERROR, FIX, ACT, name="1", task=make_task("1", task_type="a")),
        make_trajectory(ACT, name="2", task=make_task("2", task_type="a")),
        make_trajectory(
            ERROR,
            name="3",
            task=make_task("3", task_type="b"),
            success=False,
            reward=0.0,
            stop_reason=StopReason.MAX_STEPS,
        ),
    ]


def test_errors_corrections_and_lengths_are_counted_per_type():
    stats = set_stats("collect", trajectories(), KeepRules())
    a, b, everything = stats.types
    assert [row.task_type for row in stats.types] == ["a", "b", "all"]
    assert (a.num_episodes, a.num_solved, b.num_episodes, b.num_solved) == (2, 2, 1, 0)
    assert (a.num_kinds["error"], a.num_kinds["correction"], a.num_kinds["act"]) == (1, 1, 2)
    assert everything.num_kinds["error"] == 2
    assert a.steps == Lengths(mean=2.0, median=2.0, longest=3)
    assert a.tokens is None
    assert stats.error_types == {"no_op": 2}
    assert stats.stop_reasons == {"success": 2, "max_steps": 1}


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        (KeepRules(), {NOT_SUCCESSFUL: 1}),
        (KeepRules(dataset=DatasetConfig(keep="all")), {NOTHING_TRAINED: 1}),
        (KeepRules(dataset=DatasetConfig(min_reward=0.5)), {LOW_REWARD: 1}),
        (
            KeepRules(num_tokens=lambda t: 10 * len(t.steps), max_tokens=20),
            {NOT_SUCCESSFUL: 1, TOO_LONG: 1},
        ),
    ],
)
def test_every_episode_is_kept_or_dropped_with_a_reason(rules, dropped):
    stats = set_stats("collect", trajectories(), rules)
    assert stats.dropped == dropped
    assert stats.num_kept + sum(stats.dropped.values()) == stats.num_episodes == 3


def test_lengths_in_tokens_need_a_counter():
    stats = set_stats("c", trajectories(), KeepRules(num_tokens=lambda t: 10 * len(t.steps)))
    assert stats.types[-1].tokens == Lengths(mean=50 / 3, median=10, longest=30)


def test_the_command_prints_counts_and_no_control_characters(step_ray, tmp_path):
    evil = make_task("4", task_type="\x1b]0;owned\x07[red]")
    found = [*trajectories(), make_trajectory(ACT, name="4", task=evil)]
    write_shard(tmp_path / "collect", found)
    code, out, lines = step_ray("data", "stats", tmp_path / "collect")
    assert (code, lines) == (0, [])
    assert out.startswith(
        "collect: 4 episodes, 3 kept, 1 dropped (1 not successful)\n"
        "ended by: 3 success, 1 max_steps\nfaults: 2 no_op\n"
    )
    assert "\x1b" not in out and "[red]" in out


def test_the_table_fits_a_terminal_of_80_characters(step_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    task = make_task("1", task_type="pick_clean_then_place_in_recep")
    write_shard(tmp_path / "c", [make_trajectory(ACT, name="1", task=task)])
    _, out, _ = step_ray("data", "stats", tmp_path / "c")
    row = next(line for line in out.splitlines() if line.startswith("pick_clean"))
    assert row.split() == [task.task_type, *["1", "1", "0", "0", "0", "1/1", "-"]]


def test_a_run_folder_is_counted_by_its_own_settings(step_ray, tmp_path):
    run = tmp_path / "runs" / "r"
    write_shard(run / "trajectories" / "collect", trajectories())
    write_shard(run / "trajectories" / "golden", trajectories()[:1])
    config = {"name": "r", "student": {"init": "scratch"}, "dataset": {"keep": "all"}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    (run / "datasets" / "step").mkdir(parents=True)
    summary = {"num_examples": 3, "num_trajectories": 4, "dropped": {"nothing trained": 1}}
    summary |= {"num_trained_tokens": 9, "num_masked_tokens": 2}
    (run / "datasets" / "step" / "summary.json").write_text(json.dumps(summary))
    code, out, _ = step_ray("data", "stats", run)
    assert code == 0
    assert "collect: 3 episodes, 2 kept, 1 dropped (1 nothing trained)\n" in out
    assert "golden: 1 episodes, 1 kept, 0 dropped\n" in out
    assert out.endswith(
        "dataset step: 3 examples of 4 trajectories (dropped: 1 nothing trained), 9 trained and 2"
        " masked tokens\n"
    )


def test_json_has_the_same_counts(step_ray, tmp_path):
    write_shard(tmp_path / "collect", trajectories())
    _, out, _ = step_ray("data", "stats", tmp_path / "collect", "--json")
    stats = json.loads(out)["collect"]
    assert (stats["num_kept"], stats["dropped"]) == (2, {"not successful": 1})
    assert stats["types"][0]["steps"] == {"mean": 2.0, "median": 2.0, "longest": 3}


def test_export_and_import_say_what_became_of_all(step_ray, tmp_path):
    write_shard(tmp_path / "c", trajectories())
    out = tmp_path / "out.jsonl"
    code, text, _ = step_ray("data", "export", tmp_path / "c", out, "--format", "openai")
    assert (code, text) == (
        0,
        f"{out}: 2 of 3 trajectories\ndropped: 1 not successful\n"
        "turns of the agent: 3 trained, 1 masked\n",
    )
    code, text, _ = step_ray("data", "import", out, tmp_path / "back", "--env", "alfworld")
    assert (code, text) == (
        0,
        f"{tmp_path / 'back'}: 2 trajectories of 2 records\n"
        "turns of the agent: 3 trained, 1 masked\n",
    )


@pytest.mark.parametrize(
    ("args", "counts"),
    [
        (("--policy", "no_mask"), "4 trained, 0 masked"),
        (("--no-mask",), "4 trained, 0 masked"),
        (("--policy", "mask_suboptimal", "--no-mask"), "4 trained, 0 masked"),
        (("--policy", "no_reflection"), "3 trained, 1 masked"),
        (("--policy", "replace"), "3 trained, 0 masked"),
    ],
)
def test_an_export_takes_its_flags_from_a_policy(step_ray, tmp_path, args, counts):
    write_shard(tmp_path / "c", trajectories())
    out = tmp_path / "out.jsonl"
    code, text, _ = step_ray("data", "export", tmp_path / "c", out, "--format", "openai", *args)
    assert (code, text.splitlines()[-1]) == (0, f"turns of the agent: {counts}")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("export", "x", "o.jsonl", "--format", "openai", "--policy", "x"), "--policy: 'x' is not"),
        (("stats", "x"), "PATH: 'x' holds no trajectories; give a run folder or one of its"),
        (("export", "x", "o.jsonl", "--format", "csv"), "--format: 'csv' is not known; use one of"),
        (("import", "x.txt", "o"), "file 'x.txt': its name ends in none of ['.jsonl',"),
        (("import", "x.jsonl", "o"), "file 'x.jsonl': cannot be read ("),
        (("import", "x.jsonl", "o", "--source", "me"), "--source: 'me' is not known; use one of"),
    ],
)
def test_wrong_input_is_one_line(step_ray, args, line):
    code, out, lines = step_ray("data", *args)
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"step-ray: {line}")


def test_a_broken_shard_or_file_is_one_line(step_ray, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "1.parquet").write_text("no")
    (tmp_path / "x.jsonl.xz").write_text("no")
    for args in (("stats", tmp_path / "c"), ("import", tmp_path / "x.jsonl.xz", "o")):
        code, _, lines = step_ray("data", *args)
        assert (code, len(lines)) == (2, 1)
