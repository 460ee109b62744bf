"""What counts as invalid, looping, reflecting and recovering, on episodes written by hand."""

import pytest
from builders import make_step, make_task, make_trajectory

from step_ray.evaluation.behaviour import (
    behaviour,
    invalid_share,
    num_looping,
    num_reflections,
    recovered_share,
    steps_to_success,
)
from step_ray.evaluation.stats import mean_interval


def episode(*steps, **fields):
    """An episode of (action, observation, noop) triples."""
    made = [make_step(f"Action: {a}", observation=o, noop=n) for a, o, n in steps]
    return make_trajectory(*made, **fields)


GOOD, BAD = ("go", "You go.", False), ("fly", "Nothing happens.", True)


def test_what_the_environment_said_counts_not_what_it_looks_like():
    assert invalid_share(episode(GOOD, BAD, ("look", "Nothing happens.", False))) == 1 / 3


def test_older_records_are_read_by_the_text_of_a_no_op():
    old = ("fly", "Nothing happens.\n", None)
    assert invalid_share(episode(old, ("look", "A desk.", None))) == 0.5


def test_an_unreadable_answer_is_invalid():
    assert invalid_share(make_trajectory(make_step("hm", action=""), make_step())) == 0.5


def test_an_episode_without_steps_has_no_share():
    assert invalid_share(make_trajectory()) is None


def test_a_loop_is_a_pair_that_repeats_at_once_or_in_turn_with_another():
    a, b, c = ("a", "1", False), ("b", "2", False), ("c", "3", False)
    assert num_looping(episode(a, a, a)) == 2
    assert num_looping(episode(a, b, a, b, a)) == 2
    assert num_looping(episode(a, b, c, a)) == 0
    assert num_looping(episode(a, ("a", "other answer", False))) == 0


def test_a_reflection_is_a_thought_that_looks_back():
    thoughts = ("That was a mistake: I go on.", "I go to the desk.", "It did nothing.")
    steps = [make_step(thought=thought) for thought in thoughts]
    assert num_reflections(make_trajectory(*steps)) == 2


def test_an_invalid_step_is_recovered_by_a_valid_one_right_after_it():
    assert recovered_share(episode(BAD, GOOD, BAD, BAD)) == 0.5  # yes, no; the last has no next
    assert recovered_share(episode(GOOD, BAD)) is None


def test_only_solved_episodes_have_steps_to_success():
    assert steps_to_success(episode(GOOD, GOOD)) == 2
    assert steps_to_success(episode(GOOD, success=False)) is None


def test_episodes_of_a_task_are_averaged_before_the_interval():
    one, two = make_task("one"), make_task("two")
    played = [episode(GOOD, BAD, task=one), episode(GOOD, task=one), episode(BAD, task=two)]
    got = behaviour(played, 0.95)
    assert got["invalid_share"] == mean_interval([0.25, 1.0], 0.95)
    assert "recovered_share" not in got


def test_a_measure_of_one_task_has_no_bounds():
    assert behaviour([episode(GOOD)], 0.95)["looping_steps"].high == pytest.approx(float("inf"))
