"""Counts over episodes, by hand."""

from step_ray.calls.spending import Spending
from step_ray.collection.totals import Totals
from step_ray.store import Outcome
from step_ray.types import StopReason, Usage


def outcome(stop, **usage):
    return Outcome(
        trajectory_id="t",
        success=stop is StopReason.SUCCESS,
        stop_reason=stop,
        num_steps=3,
        num_corrections=1,
        usage=Usage(**usage),
    )


def test_episodes_are_added_up():
    totals = Totals()
    totals.add(outcome(StopReason.SUCCESS, teacher_calls=2, teacher_prompt_tokens=5, retries=1))
    totals.add(outcome(StopReason.LLM_ERROR, teacher_completion_tokens=4, student_cost=0.25))
    totals.add(outcome(StopReason.MAX_STEPS, teacher_calls=1, teacher_cost=1.5, cache_faults=2))

    summary = totals.summary(
        num_resumed=1, seconds=2.5, num_wanted=5, spent=Spending(calls=9), num_restarts=4
    )

    assert (summary.num_episodes, summary.num_success, summary.num_errors) == (3, 1, 1)
    assert summary.stop_reasons == {"llm_error": 1, "max_steps": 1, "success": 1}
    assert (summary.num_steps, summary.num_not_started, summary.num_resumed) == (9, 2, 1)
    assert (summary.teacher_calls, summary.teacher_tokens, summary.retries) == (3, 9, 1)
    assert (summary.teacher_cost, summary.student_cost, summary.cache_faults) == (1.5, 0.25, 2)
    assert (summary.spent_calls, summary.num_restarts, summary.seconds) == (9, 4, 2.5)


def test_nothing_is_a_summary_too():
    summary = Totals().summary(
        num_resumed=0, seconds=0.0, num_wanted=2, spent=Spending(), num_restarts=0
    )
    assert (summary.num_episodes, summary.num_not_started, summary.stop_reasons) == (0, 2, {})
