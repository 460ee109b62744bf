"""Runs with other seeds side by side: expected values by hand."""

import json

import pytest
import yaml
from builders import make_task, make_trajectory
from rich.console import Console

from step_ray.config import parse_config
from step_ray.errors import DataError
from step_ray.evaluation.compare import compare
from step_ray.evaluation.stats import mean_interval
from step_ray.report.charts import WIDTH, forest
from step_ray.report.runs import RunOutcomes, over_runs
from step_ray.store import write_shard
from step_ray.types import Interval


def solved(names, of="abcd"):
    return {task: float(task in names) for task in of}


def run(name, base, golden, step):
    outcomes = {"base": solved(base), "golden_only": solved(golden), "step": solved(step)}
    return RunOutcomes(name=name, seed=0, outcomes=outcomes)


RUNS = [run("s0", "a", "ab", "abc"), run("s1", "", "a", "ab")]


def test_runs_are_the_units_of_the_rate():
    base, golden, step = over_runs(RUNS, 0.95)
    assert [row.arm for row in (base, golden, step)] == ["base", "golden_only", "step"]
    assert step.by_run == {"s0": 0.75, "s1": 0.5}
    assert step.over_runs == mean_interval([0.75, 0.5], 0.95)
    assert base.against.keys() == {"golden_only"}


def test_a_difference_is_that_of_each_run_and_that_of_the_tasks():
    step = over_runs(RUNS, 0.95)[2].against["golden_only"]
    assert step.by_run == {"s0": 0.25, "s1": 0.25}
    assert (step.over_runs.low, step.over_runs.high) == (0.25, 0.25)
    # over runs, step solves a, b, c, d 1, 1, 0.5, 0 times, golden_only 1, 0.5, 0, 0 times
    assert (step.over_tasks.estimate, step.over_tasks.num_only_a) == (0.25, 2)


def test_an_arm_that_one_run_lacks_is_left_out():
    short = RunOutcomes(name="s2", seed=2, outcomes={"base": solved("a")})
    assert [row.arm for row in over_runs([*RUNS, short], 0.95)] == ["base"]


@pytest.mark.parametrize("runs", [RUNS[:1], [RUNS[0], RUNS[0]]])
def test_less_than_two_runs_are_refused(runs):
    with pytest.raises(DataError, match="not two or more different ones"):
        over_runs(runs, 0.95)


def test_a_forest_plot_has_zero_in_the_middle_and_marks_what_goes_beyond():
    plot = forest(
        [
            ("a", Interval(estimate=0.0, low=-0.1, high=0.2)),
            ("b", Interval(estimate=0.1, low=-float("inf"), high=float("inf"))),
        ]
    )
    assert (plot.x.low, plot.x.high) == (-105, 105)
    assert plot.rows[0].dot == plot.zero == (plot.x.start + plot.x.end) / 2 < WIDTH
    assert [(row.open_low, row.open_high) for row in plot.rows] == [(False, False), (True, True)]
    assert plot.rows[0].text == "+0.0 [-10.0, +20.0]"
    assert forest([]) is None


def folder_of_run(path, seed, won, *, splits=("dev", "dev"), partial=0.0, **changes):
    config = parse_config({"name": path.name, "seed": seed, "arms": {}} | changes)
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    played = [
        make_trajectory(
            name=f"{task}#student#0",
            task=make_task(task, split=split),
            success=task in won,
            reward=1.0 if task in won else partial,
        )
        for task, split in zip("ab", splits, strict=True)
    ]
    write_shard(path / "evaluate" / "base", played)
    return path


def test_folders_of_runs_become_a_page_and_numbers(tmp_path):
    folders = [folder_of_run(tmp_path / f"s{seed}", seed, "ab"[:seed]) for seed in (1, 2)]
    console = Console(width=100, record=True)
    compare(folders, tmp_path / "out" / "all.html", console)
    assert "<td>base</td>" in (tmp_path / "out" / "all.html").read_text()
    tables = json.loads((tmp_path / "out" / "all.json").read_text())
    (row,) = tables.pop("Success rate")
    assert not tables
    assert row["by_run"] == {"s1": 0.5, "s2": 1.0}
    assert "50 100" in console.export_text()


def test_scores_and_splits_are_compared_where_they_say_more(tmp_path):
    splits = ("dev", "test")
    tasks = {"eval_split": splits}
    folders = [
        folder_of_run(tmp_path / name, seed, won, splits=splits, partial=0.5, tasks=tasks)
        for seed, (name, won) in enumerate([("s0", "a"), ("s1", "ab")])
    ]
    console = Console(width=100, record=True)
    compare(folders, tmp_path / "all.html", console)
    tables = json.loads((tmp_path / "all.json").read_text())
    assert {title: rows[0]["by_run"] for title, rows in tables.items()} == {
        "Success rate": {"s0": 0.5, "s1": 1.0},
        "Score, in percent of the full score": {"s0": 0.75, "s1": 1.0},
        "Success rate, dev": {"s0": 1.0, "s1": 1.0},
        "Success rate, test": {"s0": 0.0, "s1": 1.0},
    }
    page, shown = (tmp_path / "all.html").read_text(), console.export_text()
    assert all(f"{title}, over runs" in text for title in tables for text in (page, shown))


def test_runs_with_other_settings_are_refused_by_name(tmp_path):
    one = folder_of_run(tmp_path / "one", 0, "a")
    other = folder_of_run(tmp_path / "other", 1, "a", train={"epochs": 9})
    with pytest.raises(DataError, match="differ in train; give runs that differ in their seed"):
        compare([one, other], tmp_path / "x.html", Console())
