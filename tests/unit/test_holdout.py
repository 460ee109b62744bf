"""Held-out tasks: the same for every model, a part of each list, disjoint from training."""

import pytest
from builders import make_task, make_trajectory

from step_ray.errors import ConfigError
from step_ray.training.holdout import held_out_lines, held_out_tasks, of_tasks
from step_ray.training.recipe import DatasetConfig

U1 = [f"u1-{i}" for i in range(10)]
U2 = [f"u2-{i}" for i in range(20)]


def held(seed=0, lists=(U1, U2), **config):
    return held_out_tasks(lists, DatasetConfig(**config), seed=seed)


def test_a_share_is_taken_of_each_list():
    tasks = held(validation_share=0.2)

    assert (len(tasks & set(U1)), len(tasks & set(U2))) == (2, 4)


def test_a_small_share_still_takes_one_task_of_each_list():
    assert len(held(validation_share=0.001)) == 2


def test_a_number_is_taken_of_each_list_and_a_larger_one_adds_to_it():
    three, five = held(validation_tasks=3), held(validation_tasks=5)

    assert (len(three), len(five)) == (6, 10)
    assert three < five


def test_the_order_of_the_lists_does_not_matter_and_the_seed_does():
    tasks = held(validation_tasks=3)

    assert held(validation_tasks=3, lists=(U1[::-1], U2[::-1])) == tasks
    assert held(validation_tasks=3, seed=1) != tasks


def test_holding_out_all_of_a_list_is_refused():
    with pytest.raises(ConfigError, match="10 of the 10 tasks of a list"):
        held(validation_tasks=10)


def test_every_rollout_of_a_held_out_task_is_held_out():
    rollouts = [make_trajectory(name=f"a#{i}", task=make_task("a")) for i in range(3)]
    other = make_trajectory(name="b#0", task=make_task("b"))

    assert list(of_tasks([*rollouts, other], {"a"}, is_held=True)) == rollouts
    assert list(of_tasks([*rollouts, other], {"a"}, is_held=False)) == [other]


def test_what_is_held_out_is_told_with_its_error_tokens():
    summary = {"num_validation": 3, "num_validation_tokens": 1200}
    summary |= {"num_validation_error_tokens": 40, "validation_dropped": {"not successful": 2}}
    assert held_out_lines("step", summary) == [
        "step: 3 examples held out (dropped: 2 not successful), 1,200 tokens in the loss, 40 masked"
        " error tokens"
    ]
    assert held_out_lines("step", {"num_examples": 3}) == []
