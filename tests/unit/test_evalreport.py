"""The evaluation of one model: every episode counted once, behaviour by hand."""

import pytest
from builders import make_evaluated
from hypothesis import given
from hypothesis import strategies as st

from step_ray.errors import DataError
from step_ray.evaluation.evalreport import summarize
from step_ray.evaluation.stats import mean_interval, wilson_interval
from step_ray.types import ERROR_STOPS, TRUNCATED_STOPS, StopReason

ENV_NOOP = "Nothing happens."


def test_repeating_every_task_does_not_narrow_the_interval():
    once = [make_evaluated(t, success=t in "abc") for t in "abcdef"]
    thrice = [make_evaluated(t, success=t in "abc", seed=s) for t in "abcdef" for s in range(3)]
    reports = [summarize("m", episodes, 0.95, 1.0, 0) for episodes in (once, thrice)]
    assert reports[0].success_rate == reports[1].success_rate
    assert reports[0].mean_reward == reports[1].mean_reward
    assert (reports[0].num_tasks, reports[1].num_tasks) == (6, 18)


def test_summary_by_hand():
    report = summarize(
        "step",
        [
            make_evaluated("a", "You see", ENV_NOOP, success=True, stop_reason=StopReason.SUCCESS),
            make_evaluated("b", *(ENV_NOOP + "\n",) * 4, stop_reason=StopReason.MAX_STEPS),
            make_evaluated("c", stop_reason=StopReason.LLM_ERROR, task_type="heat"),
            make_evaluated("d", stop_reason=StopReason.BAD_FORMAT, task_type="heat"),
        ],
        0.95,
        12.5,
        7,
    )
    assert (report.num_tasks, report.num_success, report.num_failed) == (4, 1, 1)
    assert (report.num_truncated, report.num_errors) == (1, 1)
    assert report.success_rate == wilson_interval(1, 4, 0.95)
    assert report.mean_reward.estimate == 0.25
    assert (report.mean_steps, report.mean_invalid) == (1.5, 1.25)
    assert report.by_task_type == {
        "heat": wilson_interval(0, 2, 0.95),
        "pick": wilson_interval(1, 2, 0.95),
    }
    assert report.reward_by_task_type == {
        "heat": mean_interval([0.0, 0.0], 0.95),
        "pick": mean_interval([1.0, 0.0], 0.95),
    }
    assert report.stop_reasons == {
        "success": 1,
        "max_steps": 1,
        "llm_error": 1,
        "bad_format": 1,
    }
    assert (report.model, report.seconds, report.seed) == ("step", 12.5, 7)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(StopReason)), min_size=1, max_size=30))
def test_counts_add_up_and_a_success_is_only_a_success(outcomes):
    episodes = [
        make_evaluated(f"t{i}", success=s, stop_reason=r) for i, (s, r) in enumerate(outcomes)
    ]
    report = summarize("m", episodes, 0.95, 0.0, 0)
    parts = (report.num_success, report.num_failed, report.num_truncated, report.num_errors)
    assert sum(parts) == report.num_tasks == sum(report.stop_reasons.values()) == len(outcomes)
    assert report.num_success == sum(success for success, _ in outcomes)
    assert report.num_errors == sum(r in ERROR_STOPS for s, r in outcomes if not s)
    assert report.num_truncated == sum(r in TRUNCATED_STOPS for s, r in outcomes if not s)


def test_nothing_and_duplicates_are_refused():
    with pytest.raises(DataError, match="'m' has no trajectories"):
        summarize("m", [], 0.95, 0.0, 0)
    with pytest.raises(DataError, match="'a#student#0' 2 times"):
        summarize("m", [make_evaluated("a"), make_evaluated("a")], 0.95, 0.0, 0)
