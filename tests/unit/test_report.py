"""The report shows the numbers it was given, escapes all text and needs nothing else."""

import csv
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from builders import make_step, make_task, make_trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from step_ray.errors import DataError
from step_ray.evaluation.stats import mean_interval, wilson_interval
from step_ray.report import (
    CollectionCounts,
    ReportInputs,
    results_rows,
    results_table,
    splits_table,
    write_report,
    write_results,
)
from step_ray.report.charts import linear_ticks, log_ticks, loss_chart, running_mean
from step_ray.report.page import (
    collection_summary,
    cost_lines,
    dataset_lines,
    example_view,
    spending_facts,
    split_reflection,
    validation_lines,
)
from step_ray.report.results import EpisodeCounts
from step_ray.types import (
    EvalReport,
    StepKind,
    StopReason,
    Trajectory,
    Usage,
    Verdict,
    VerdictLabel,
)

CONFIG = {
    "arms": {
        "golden_only": {"self_reflected": False},
        "step": {"self_reflected": True},
    },
    "dataset": {"mask_suboptimal": True},
}


def mended(name: str, observation: str = "Nothing happens.", **more) -> Trajectory:
    """An error with its correction, then an ordinary step."""
    fault = Verdict(label=VerdictLabel.ERROR, error_type="no_op", reflection="No mug there.")
    steps = (
        make_step("Action: take mug", observation, StepKind.ERROR, verdict=fault),
        make_step(
            "Thought: No mug there. I go on.\nAction: go",
            kind=StepKind.CORRECTION,
            index=1,
            reflection="No mug there.",
        ),
        make_step(index=2, verdict=Verdict(label=VerdictLabel.GOOD)),
    )
    defaults = {
        "steps": steps,
        "task": make_task(name, goal="find a mug", task_type="pick"),
        "usage": Usage(
            env_steps=3, teacher_calls=2, teacher_prompt_tokens=500, teacher_completion_tokens=50
        ),
    }
    return make_trajectory(name=f"{name}#self_reflected#0", **defaults | more)


def make_report(model: str, num_success: int, num_tasks: int = 4) -> EvalReport:
    success = wilson_interval(num_success, num_tasks, 0.95)
    values = [1.0] * num_success + [0.0] * (num_tasks - num_success)
    return EvalReport(
        model=model,
        num_tasks=num_tasks,
        num_success=num_success,
        num_failed=0,
        num_truncated=num_tasks - num_success,
        num_errors=0,
        success_rate=success,
        mean_reward=mean_interval(values, 0.95),
        mean_steps=12.5,
        mean_invalid=1.25,
        stop_reasons={"success": num_success, "max_steps": num_tasks - num_success},
        by_task_type={"pick": success},
        seconds=60.0,
        seed=0,
    )


def outcome(solved: str) -> dict[str, float]:
    return {task: float(task in solved) for task in "abcd"}


def full_inputs() -> ReportInputs:
    return ReportInputs(
        run={"name": "demo", "versions": {"ray": "2.60.0"}, "base_url": "https://llm.example/v1"},
        config=CONFIG,
        evals=[make_report("base", 1), make_report("step", 4)],
        outcomes={"base": outcome("a"), "step": outcome("abcd")},
        training={"step": [{"step": i, "loss": 1 / i} for i in range(1, 50)]},
        collection=CollectionCounts.of([mended("t1"), mended("t2")]),
        datasets={"step": {"num_examples": 7, "num_trained_tokens": 1234}},
        task_types=dict.fromkeys("abcd", "pick"),
    )


class Page(HTMLParser):
    """Tags, link-like attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str | None] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href", "xlink:href", "action"}]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data):
        self.text += data


def render(folder: Path, inputs: ReportInputs) -> Page:
    path = folder / "report.html"
    write_report(path, inputs)
    return Page(path.read_text(encoding="utf-8"))


def test_report_shows_the_numbers_it_was_given(tmp_path):
    text = " ".join(render(tmp_path, full_inputs()).text.split())
    assert "100.0[51.0, 100.0]" in text
    assert "+75.0[" in text  # step solves b, c, d that base does not: p = 2 / 2^3
    assert "p = 0.250" in text
    assert "1,234" in text
    assert "ray 2.60.0" in text
    assert "No mug there." in text


def test_several_splits_are_compared_one_by_one(tmp_path):
    halves = {
        "base": {"seen": wilson_interval(1, 2, 0.95), "unseen": wilson_interval(0, 2, 0.95)},
        "step": {"seen": wilson_interval(2, 2, 0.95), "unseen": wilson_interval(2, 2, 0.95)},
    }
    inputs = full_inputs()
    evals = [replace(report, by_split=halves[report.model]) for report in inputs.evals]
    splits = {"a": "seen", "b": "seen", "c": "unseen", "d": "unseen"}
    inputs = replace(inputs, evals=evals, splits=splits)
    step = results_rows(inputs)[2].splits
    assert (step["seen"].vs_base.estimate, step["unseen"].vs_base.estimate) == (0.5, 1.0)
    assert (step["seen"].vs_base.num_tasks, step["unseen"].vs_base.num_only_a) == (2, 2)
    assert "By split" in render(tmp_path, inputs).text
    console = Console(file=StringIO(), width=200, record=True)
    console.print(splits_table(inputs))
    assert "unseen" in console.export_text() and splits_table(full_inputs()) is None
    assert "By split" not in render(tmp_path, full_inputs()).text


def test_scores_that_are_more_than_successes_are_compared_and_split_by_type(tmp_path):
    graded = [
        replace(
            make_report(model, 1),
            mean_reward=mean_interval(values, 0.95),
            reward_by_task_type={"pick": mean_interval(values, 0.95)},
        )
        for model, values in (("base", [1.0, 0.2, 0.2, 0.2]), ("step", [1.0, 0.6, 0.6, 0.2]))
    ]
    scores = {
        "base": dict(zip("abcd", [1.0, 0.2, 0.2, 0.2], strict=True)),
        "step": dict(zip("abcd", [1.0, 0.6, 0.6, 0.2], strict=True)),
    }
    inputs = replace(full_inputs(), evals=graded, scores=scores)
    text = " ".join(render(tmp_path, inputs).text.split())
    assert "Scores, in percent of the full score" in text
    assert "+20.0[+0.0, +40.0]p = 0.500" in text  # better on b and c only: 2 / 2^2
    assert text.count("60.0[8.0, 112.0]") == 2  # t(3) = 3.182, s = 0.3266, over 2
    plain = " ".join(render(tmp_path, full_inputs()).text.split())
    assert "of the full score" not in plain.replace("as shares of the full score", "")


def test_page_needs_no_network_and_has_no_script(tmp_path):
    page = render(tmp_path, full_inputs())
    assert page.links == ["data:,"]
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|<script|(src|href)\s*=\s*[\"']?https?:", html, re.I)


def test_a_viewer_beside_the_page_is_linked_and_only_then(tmp_path):
    page = render(tmp_path, replace(full_inputs(), episodes=EpisodeCounts(1200, 3000)))
    arms = ["base", "step"]
    links = [f"episodes.html#agent=evaluate/{arm}" for arm in arms]
    assert page.links == ["data:,", "episodes.html", *links]
    assert "1,200 of 3,000 episodes" in page.text
    assert "script" not in page.tags


def test_script_in_an_observation_stays_text(tmp_path):
    attack = "</div><script>alert(1)</script>"
    page = render(
        tmp_path,
        replace(full_inputs(), collection=CollectionCounts.of([mended("t1", observation=attack)])),
    )
    assert "script" not in page.tags
    assert attack in page.text


# what "Thought: " holds itself is found there, and not where the reflection stands
TEXTS = st.text(
    st.sampled_from("<>&\"'/=a \n{}%") | st.characters(), min_size=1, max_size=40
).filter(lambda text: text not in "Thought: ")


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXTS)
def test_untrusted_text_adds_no_tags(tmp_path, text):
    def inputs(text: str) -> ReportInputs:
        step = make_report("step", 4)
        task = make_task(goal=text, task_type=text)
        verdict = Verdict(label=VerdictLabel.ERROR, error_type=text)
        steps = (
            make_step(text, text, StepKind.ERROR, verdict=verdict),
            # no other text around the reflection, in which it might be found
            make_step(text, kind=StepKind.CORRECTION, index=1, reflection=text),
        )
        return ReportInputs(
            run={"name": text, text: text},
            config={"arms": {f"arm {text}": {}}},
            evals=[replace(step, model=f"m {text}", by_task_type={text: step.success_rate})],
            training={text: [{"step": 1, "loss": 1.0}]},
            collection=CollectionCounts.of(
                [mended("t", task=task, steps=steps, models={text: text})]
            ),
            datasets={text: {f"key {text}": text}},
        )

    assert render(tmp_path, inputs(text)).tags == render(tmp_path, inputs("plain")).tags


def test_missing_stages_are_shown_as_not_run(tmp_path):
    page = render(tmp_path, ReportInputs(run={"name": "empty"}, config=CONFIG))
    assert page.text.count("not run") >= 8
    assert page.text.count("not recorded") == 5
    assert "0.0[" not in page.text


def test_rows_are_base_then_configured_arms_then_others():
    inputs = replace(full_inputs(), evals=[make_report("student", 0), make_report("step", 4)])
    rows = results_rows(inputs)
    assert [row.arm for row in rows] == ["base", "golden_only", "step", "student"]
    assert [row.report is None for row in rows] == [True, True, False, False]


def test_comparison_words_say_why_there_is_no_number():
    inputs = full_inputs()
    other = replace(inputs, outcomes={"base": {"a": 1.0}, "step": outcome("a")})
    assert results_rows(other)[2].vs_base.startswith("not comparable (comparison: 3 of 4 tasks")
    base, golden, step = results_rows(inputs)
    assert base.vs_base == "reference"
    assert (golden.vs_base, step.vs_golden_only) == ("not run", "not run")
    assert (step.vs_base.estimate, step.vs_base.p_value) == (0.75, 0.25)


def test_two_evaluations_of_one_arm_are_refused():
    inputs = replace(full_inputs(), evals=[make_report("step", 4), make_report("step", 3)])
    with pytest.raises(DataError, match="'step' has 2 evaluations"):
        results_rows(inputs)


def test_terminal_table_shows_the_same_numbers():
    console = Console(file=StringIO(), width=200, record=True)
    console.print(results_table(replace(full_inputs(), config={"arms": {"[red]x": {}}})))
    text = console.export_text()
    assert "100.0" in text and "+75.0" in text and "p = 0.250" in text
    assert "[red]x" in text and "not run" in text


def test_final_and_best_score_are_apart_and_etos_is_named(tmp_path):
    inputs = full_inputs()
    best = mean_interval([0.5, 0.875], 0.95)
    evals = [replace(e, mean_best_reward=best, scoring="eto") for e in inputs.evals]
    write_report(tmp_path / "eto.html", replace(inputs, evals=evals))
    html = (tmp_path / "eto.html").read_text()
    assert "<th>final score</th><th>best score</th>" in html
    assert "(eto)<small>" in html and ">0.688</td>" in html
    write_report(tmp_path / "final.html", inputs)
    assert "(eto)<small>" not in (tmp_path / "final.html").read_text()


def test_results_files_hold_all_numbers_and_no_infinity(tmp_path):
    single = make_report("step", 1, num_tasks=1)
    assert single.mean_reward.low == -math.inf
    write_results(tmp_path, replace(full_inputs(), evals=[make_report("base", 1), single]))
    rows = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [row["arm"] for row in rows] == ["base", "golden_only", "step"]
    assert rows[1]["report"] is None
    assert rows[2]["report"]["mean_reward"]["low"] is None
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["num_success"] for line in lines] == ["1", "", "1"]
    assert lines[0]["success_rate_estimate"] == "0.25"
    assert lines[2]["mean_reward_low"] == ""
    assert (lines[2]["vs_base_estimate"], lines[2]["vs_golden_only"]) == ("0.75", "not run")


def test_an_arm_with_self_reflected_data_pays_for_the_whole_collection():
    inputs = full_inputs()
    inputs = replace(inputs, datasets={**inputs.datasets, "other": {}})
    assert cost_lines(inputs) == [
        ("base", [None, None, 0, 0, 0, 0.0, 0]),
        ("golden_only", [None, None, 0, 0, 0, 0.0, 0]),
        ("step", [7, 1234, 4, 1100, 0, 0.0, 6]),
        ("other", [None] * 7),
    ]
    nothing = cost_lines(replace(inputs, collection=CollectionCounts()))[2]
    assert nothing == ("step", [7, 1234, *[None] * 5])


def test_money_and_cached_replies_are_in_the_files_and_on_the_page(tmp_path):
    usage = Usage(teacher_calls=2, teacher_cached_calls=3, teacher_cost=1.5, student_cost=0.25)
    summary = {"spent_calls": 5, "spent_tokens": 700, "spent_money": 2.0, "unfinished": "3 to go"}
    state = {"status": "partial", "budget": {"money": 2.0}, "summary": summary}
    inputs = replace(
        full_inputs(),
        collection=CollectionCounts.of([replace(mended("t1"), usage=usage)] * 2),
        collection_state=state,
    )
    write_results(tmp_path, inputs)
    step = json.loads((tmp_path / "results.json").read_text())[2]["cost"]
    assert (step["money"], step["teacher_calls"], step["teacher_cached_calls"]) == (3.5, 4, 6)
    record = json.loads((tmp_path / "collection.json").read_text())
    assert (record["status"], record["summary"]) == ("partial", summary)
    assert record["cost_of_what_counts"]["money"] == 3.5
    text = render(tmp_path, inputs).text
    assert "lost or played again included: 5 calls, 700 tokens, 2 money; budget: 2 money." in text
    assert "Not all of it was played: 3 to go." in text


def test_without_a_record_of_the_collection_nothing_is_said_about_its_budget():
    assert spending_facts({}) == []
    assert spending_facts({"status": "started", "summary": {}}) == []


def test_an_arm_with_its_own_successes_pays_for_all_rollouts_and_no_teacher():
    alone = mended("t1", usage=Usage(env_steps=5))
    arms = {"rft": {"own_success": True}, "both": {"own_success": True, "self_reflected": True}}
    inputs = replace(full_inputs(), own=CollectionCounts.of([alone] * 2), config={"arms": arms})
    lines = dict(cost_lines(inputs))
    assert lines["rft"] == [None, None, 0, 0, 0, 0.0, 10]
    assert lines["both"] == [None, None, 4, 1100, 0, 0.0, 16]
    unknown = dict(cost_lines(replace(inputs, own=CollectionCounts())))["both"]
    assert unknown[2:] == [None] * 5


def test_validations_show_the_last_and_the_best_of_each_arm(tmp_path):
    def line(step, loss, **fields):
        return {"step": step, "loss": 1.0, "validation_loss": loss, **fields}

    training = {
        "base": [{"step": 1, "loss": 2.0}, line(2, 0.5)],
        "step": [line(2, 0.25, error_nll=3.0), line(4, 0.75, error_nll=4.5)],
        "other": [{"step": 1, "loss": 2.0}],
    }
    assert validation_lines(training) == [
        ("base", [0.5, None, 0.5, 2]),
        ("step", [0.75, 4.5, 0.25, 2]),
    ]
    write_report(tmp_path / "index.html", replace(full_inputs(), training=training))
    page = (tmp_path / "index.html").read_text()
    assert "error-step NLL" in page
    assert ">4.5<" in page


def test_collection_counts_by_hand():
    failed = mended("t3", success=False, stop_reason=StopReason.MAX_STEPS, steps=())
    summary = collection_summary(CollectionCounts.of([mended("t1"), mended("t2"), failed]), 0.95)
    facts, counts = dict(summary["facts"]), dict(summary["counts"])
    assert (facts["episodes"], facts["successful"], facts["corrections"]) == ("3", "2", "2")
    assert (facts["per episode"], facts["teacher tokens"]) == ("0.67", "1,650")
    assert counts["Stop reasons"] == [("success", 2), ("max_steps", 1)]
    assert counts["Verdicts on steps"] == [("error", 2), ("good", 2)]
    assert counts["Error types"] == [("no_op", 2)]
    assert counts["Episodes by number of corrections"] == [(0, 1), (1, 2)]


def test_dataset_table_leaves_gaps_where_an_arm_lacks_a_number():
    summaries = {"a": {"num_examples": 3, "dropped": {"too_long": 1}}, "b": {"digest": "9f"}}
    assert dataset_lines(summaries) == [
        ("examples", [3, None]),
        ("dropped: too_long", [1, None]),
        ("digest", [None, "9f"]),
    ]


def test_examples_have_an_error_and_a_correction_and_mix_task_types():
    heat = replace(mended("z").task, task_type="heat")
    plain = mended("a0", steps=(make_step(),))
    lost = mended("a1", success=False)
    pool = [plain, lost, mended("c"), mended("b"), mended("d"), mended("z", task=heat)]
    chosen = CollectionCounts.of(pool).examples()
    assert [t.trajectory_id[0] for t in chosen] == ["b", "z", "c"]


def test_example_view_marks_what_is_trained():
    steps = tuple(make_step(kind=kind, index=i) for i, kind in enumerate(StepKind))
    for mask_suboptimal, expected in ((True, [1, 0, 0, 1, 0]), (False, [1, 0, 1, 1, 0])):
        view = example_view(mended("t", steps=steps), mask_suboptimal)
        assert [trained for _, trained, _ in view["steps"]] == expected


@given(st.text(), st.text(), st.text())
def test_splitting_off_the_reflection_loses_no_text(before, reflection, after):
    step = make_step(before + reflection + after, kind=StepKind.CORRECTION, reflection=reflection)
    parts = split_reflection(step)
    assert "".join(parts) == step.text
    assert parts[1] == reflection


def test_chart_counts_what_it_cannot_draw():
    losses = [1.0, float("nan"), 0.0, None, 0.5]
    lines = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    training = {"step": [*lines, {"eval_loss": 3.0}], "empty": []}
    assert loss_chart(training, log_y=True).num_left_out == 3
    linear = loss_chart(training, log_y=False)
    assert linear.num_left_out == 2
    assert [line.arm for line in linear.lines] == ["step"]


def test_chart_places_points_between_its_axes():
    chart = loss_chart({"a": [{"step": 0, "loss": 1.0}, {"step": 10, "loss": 0.0}]}, log_y=False)
    assert chart.lines[0].raw == "64.0,23.6 948.0,256.0"  # 256 - 244 / 1.05
    assert chart.x.ticks()[0] == (64.0, "0")
    assert chart.y.ticks()[0] == (256.0, "0")


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=20), st.booleans()
)
def test_any_losses_give_a_chart_inside_its_frame(losses, log_y):
    chart = loss_chart({"a": [{"step": i, "loss": v} for i, v in enumerate(losses)]}, log_y=log_y)
    drawable = [v for v in losses if math.isfinite(v) and (v > 0 or not log_y)]
    assert (chart is None) == (not drawable)
    if chart is not None:
        assert chart.num_left_out == len(losses) - len(drawable)
        pixels = [p.split(",") for line in chart.lines for p in f"{line.raw} {line.mean}".split()]
        assert all(63 <= float(x) <= 949 and 11 <= float(y) <= 257 for x, y in pixels)
        assert all(11 <= y <= 257 for y, _ in chart.y.ticks())


def test_no_losses_give_no_chart():
    assert loss_chart({}, log_y=True) is None
    assert loss_chart({"a": [{"step": 1}]}, log_y=False) is None


def test_ticks_are_round():
    assert linear_ticks(0, 860) == [0, 200, 400, 600, 800]
    assert linear_ticks(0, 0.5) == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert log_ticks(0.03, 3) == [0.05, 0.1, 0.2, 0.5, 1, 2]
    assert log_ticks(1e-6, 2) == [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1]
    assert log_ticks(1.1, 1.9) == [1.2, 1.4, 1.6, 1.8]


def test_running_mean_by_hand():
    assert running_mean(np.array([4.0, 2.0, 0.0, 6.0]), 2).tolist() == [4.0, 3.0, 1.0, 3.0]
