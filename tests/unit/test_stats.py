"""Statistics: expected values computed by hand or taken from printed tables."""

import math

import pytest
from builders import make_evaluated
from hypothesis import given
from hypothesis import strategies as st

from step_ray.errors import DataError
from step_ray.evaluation.stats import (
    mean_interval,
    paired_difference,
    success_by_task,
    t_quantile,
    wilson_interval,
)


def binary(solved: str, of: str = "abcdefghij") -> dict[str, float]:
    return {task: float(task in solved) for task in of}


def test_wilson_half():
    # z^2 = 3.841459: centre 0.5, half width 1.959964 / 1.03841459 * sqrt(0.002596036) = 0.096168.
    interval = wilson_interval(50, 100, 0.95)
    assert (interval.estimate, interval.confidence) == (0.5, 0.95)
    assert interval.low == pytest.approx(0.403832, abs=1e-6)
    assert interval.high == pytest.approx(0.596168, abs=1e-6)


def test_wilson_none_of_ten_reaches_up_to_z2_over_n_plus_z2():
    interval = wilson_interval(0, 10, 0.95)
    assert (interval.estimate, interval.low) == (0.0, 0.0)
    assert interval.high == pytest.approx(3.841459 / 13.841459, abs=1e-6)


def test_wilson_all_of_ten_mirrors_none():
    interval = wilson_interval(10, 10, 0.95)
    assert interval.high == 1.0
    assert interval.low == pytest.approx(10 / 13.841459, abs=1e-6)


@pytest.mark.parametrize(("num_success", "num_tasks"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(num_success, num_tasks):
    with pytest.raises(DataError, match="is no proportion"):
        wilson_interval(num_success, num_tasks, 0.95)


@given(num=st.integers(1, 5000), data=st.data(), confidence=st.floats(0.01, 0.999))
def test_wilson_contains_its_estimate_and_stays_in_the_unit_interval(num, data, confidence):
    interval = wilson_interval(data.draw(st.integers(0, num)), num, confidence)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


@pytest.mark.parametrize(
    ("df", "confidence", "expected"),
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.99, 5.841),
        (4, 0.95, 2.776),
        (9, 0.90, 1.833),
        (10, 0.95, 2.228),
        (29, 0.95, 2.045),
        (120, 0.95, 1.980),
    ],
)
def test_t_quantile_matches_the_printed_table(df, confidence, expected):
    assert t_quantile(confidence, df) == pytest.approx(expected, abs=6e-4)


def test_mean_interval_by_hand():
    # Mean 2, s = 1, n = 3: 2 ± 4.30265 / sqrt(3).
    interval = mean_interval([1.0, 2.0, 3.0], 0.95)
    assert interval.estimate == 2.0
    assert interval.high - 2.0 == pytest.approx(2.484138, abs=1e-5)
    assert 2.0 - interval.low == pytest.approx(2.484138, abs=1e-5)


def test_one_value_has_an_unbounded_interval():
    interval = mean_interval([0.5], 0.95)
    assert (interval.estimate, interval.low, interval.high) == (0.5, -math.inf, math.inf)


def test_no_values_are_refused():
    with pytest.raises(DataError, match="no values"):
        mean_interval([], 0.95)


def test_mcnemar_by_hand():
    # a only: b c d e f; b only: j; 6 discordant: p = 2 (C(6,0) + C(6,1)) / 64 = 14/64.
    difference = paired_difference(binary("abcdef"), binary("aj"), 0.95)
    assert (difference.num_tasks, difference.num_only_a, difference.num_only_b) == (10, 5, 1)
    assert difference.p_value == 14 / 64
    assert difference.estimate == pytest.approx(0.4)


def test_equal_outcomes_have_p_one_and_no_difference():
    difference = paired_difference(binary("abc"), binary("abc"), 0.95)
    assert (difference.estimate, difference.low, difference.high) == (0, 0, 0)
    assert difference.p_value == 1.0


def test_balanced_discordance_has_p_one():
    assert paired_difference(binary("ab"), binary("cd"), 0.95).p_value == 1.0


def test_swapping_the_models_mirrors_the_difference():
    forth = paired_difference(binary("abcdef"), binary("aj"), 0.95)
    back = paired_difference(binary("aj"), binary("abcdef"), 0.95)
    assert (back.estimate, back.low, back.high) == (-forth.estimate, -forth.high, -forth.low)
    assert back.p_value == forth.p_value
    assert (back.num_only_a, back.num_only_b) == (forth.num_only_b, forth.num_only_a)


def test_bootstrap_width_is_that_of_the_normal_theory():
    # 200 tasks, half of them won by a: sd of the mean 0.5 / sqrt(200), 1.96 of it = 0.0693.
    tasks = [f"t{i:03}" for i in range(200)]
    a = {task: float(i % 2) for i, task in enumerate(tasks)}
    difference = paired_difference(a, dict.fromkeys(tasks, 0.0), 0.95)
    assert difference.low == pytest.approx(0.5 - 0.0693, abs=0.01)
    assert difference.high == pytest.approx(0.5 + 0.0693, abs=0.01)


@given(
    st.dictionaries(
        st.text(max_size=3), st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20
    )
)
def test_bootstrap_contains_the_estimate_and_repeats_itself(pairs):
    a, b = ({k: v[i] for k, v in pairs.items()} for i in (0, 1))
    first = paired_difference(a, b, 0.95, seed=3)
    assert first.low - 1e-12 <= first.estimate <= first.high + 1e-12
    assert first == paired_difference(dict(reversed(a.items())), b, 0.95, seed=3)


def test_other_seeds_give_other_resamples():
    a, b = {str(i): i**0.5 for i in range(30)}, {str(i): 0.0 for i in range(30)}
    assert paired_difference(a, b, 0.95, seed=0).low != paired_difference(a, b, 0.95, seed=1).low


def test_different_tasks_are_refused_with_their_number():
    with pytest.raises(DataError, match="2 of 3 tasks are not in both"):
        paired_difference({"a": 1, "b": 0}, {"a": 1, "c": 0}, 0.95)
    with pytest.raises(DataError):
        paired_difference({}, {}, 0.95)


def test_seeds_of_a_task_are_averaged_first():
    episodes = [
        make_evaluated("a", success=s, seed=i) for i, s in enumerate((True, False, True, True))
    ]
    assert success_by_task([*episodes, make_evaluated("b")]) == {"a": 0.75, "b": 0.0}
