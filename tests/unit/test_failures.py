"""When a stage of episodes is stopped, counted by hand."""

import pytest

from step_ray.collection.failures import ErrorWatch
from step_ray.store import Outcome
from step_ray.types import Source, StopReason, Task, Trajectory

TASK = Task(task_id="t", env="e", split="s", goal="")


def episode(stop, number=0):
    return Trajectory(
        trajectory_id=f"t{number}",
        task=TASK,
        prompt=(),
        steps=(),
        reward=0.0,
        success=stop is StopReason.SUCCESS,
        stop_reason=stop,
        source=Source.STUDENT,
        seed=0,
        error="down",
    )


def watch(stops, *, num_wanted=1000, max_share=0.05, max_errors=None, is_old=False):
    watched = ErrorWatch(
        num_wanted=num_wanted, max_share=max_share, max_errors=max_errors, judged_after=20
    )
    for number, stop in enumerate(stops):
        watched.add(Outcome.of(episode(stop, number)), is_old=is_old)
    return watched


GOOD, BAD = [StopReason.SUCCESS], [StopReason.LLM_ERROR]


def test_nothing_is_judged_before_there_are_enough_episodes():
    assert watch(BAD * 19).forecast == ""


def test_when_all_fail_it_stops_at_the_first_look():
    assert watch(BAD * 20).forecast == (
        "20 of the first 20 episodes ended by an error (llm_error 20), more than"
        " collect.max_error_share 0.05 allows; with --retry-errors (collect.retry_errors) the same"
        " command plays these again (first: t0: down)"
    )


@pytest.mark.parametrize(("num_bad", "stops"), [(1, False), (5, False), (6, True)])
def test_a_share_that_chance_may_explain_goes_on(num_bad, stops):
    # 99.9 % Wilson bounds of 5/30 and 6/30: 0.044 and 0.059
    assert bool(watch(GOOD * (30 - num_bad) + BAD * num_bad).forecast) is stops


def test_it_stops_once_no_end_can_be_good():
    # 5 of 100 are allowed; 6 of 90 is no significant share
    assert watch(GOOD * 84 + BAD * 5, num_wanted=100).forecast == ""
    line = watch(GOOD * 84 + BAD * 6, num_wanted=100).forecast
    assert line.startswith("6 of 100 episodes ended by an error (llm_error 6)")


def test_a_number_of_errors_counts_at_once():
    limited = watch(BAD * 3, max_errors=2)
    assert limited.forecast.startswith("3 of 1000 episodes")
    assert "collect.max_errors 2" in limited.forecast
    assert watch(BAD * 2, max_errors=2).forecast == ""


def test_errors_of_an_earlier_start_are_no_sign_of_this_one():
    old = watch(BAD * 30, is_old=True)
    for _ in range(40):
        old.add(Outcome.of(episode(StopReason.SUCCESS)))
    assert (old.forecast, old.fault) == ("", "")
    assert watch(BAD * 51, is_old=True).fault.startswith("51 of 1000 episodes")


def test_ends_of_the_agent_and_of_the_budget_are_no_errors():
    ends = [StopReason.MAX_STEPS, StopReason.BAD_FORMAT, StopReason.BUDGET, StopReason.ENV_DONE]
    assert watch(ends * 20, max_share=0.0, max_errors=0).forecast == ""
