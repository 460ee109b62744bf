"""The statistics against those of scipy, on random data."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from step_ray.evaluation.stats import (
    mean_interval,
    paired_difference,
    t_quantile,
    wilson_interval,
)

CONFIDENCE = st.floats(0.5, 0.999)
SCORES = st.lists(st.integers(0, 100).map(lambda n: n / 100), min_size=2, max_size=200)


def approx(value):
    return pytest.approx(value, rel=1e-7, abs=1e-9)


@given(num=st.integers(1, 3000), data=st.data(), confidence=CONFIDENCE)
def test_wilson_intervals(num, data, confidence):
    solved = data.draw(st.integers(0, num))
    ours = wilson_interval(solved, num, confidence)
    theirs = stats.binomtest(solved, num).proportion_ci(confidence, method="wilson")
    assert (ours.low, ours.high) == approx((theirs.low, theirs.high))


@given(df=st.integers(1, 3000), confidence=CONFIDENCE)
def test_quantiles_of_student_t(df, confidence):
    assert t_quantile(confidence, df) == approx(stats.t.ppf((1 + confidence) / 2, df))


@given(values=SCORES, confidence=CONFIDENCE)
def test_intervals_of_a_mean(values, confidence):
    ours = mean_interval(values, confidence)
    mean, error = np.mean(values), stats.sem(values)
    assert ours.estimate == approx(mean)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error
    assert (ours.low, ours.high) == approx((mean - half, mean + half))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_the_exact_mcnemar_test(pairs):
    a, b = ({str(i): float(pair[k]) for i, pair in enumerate(pairs)} for k in (0, 1))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    wanted = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert paired_difference(a, b, 0.95).p_value == approx(wanted)


@given(values=SCORES, seed=st.integers(0, 1000))
def test_the_sign_test_of_scores(values, seed):
    draw = random.Random(seed)
    a, b = ({str(i): x for i, x in enumerate(draw.sample(values, len(values)))} for _ in (0, 1))
    more, less = sum(a[i] > b[i] for i in a), sum(a[i] < b[i] for i in a)
    wanted = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    assert paired_difference(a, b, 0.95).p_value == approx(wanted)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("num", "seed"), [(30, 0), (200, 1), (1000, 2)])
def test_the_paired_bootstrap(num, seed, confidence):
    draw = np.random.default_rng(seed)
    a, b = draw.binomial(1, 0.5, num).astype(float), draw.beta(2, 3, num)
    ours = paired_difference(*({str(i): x for i, x in enumerate(v)} for v in (a, b)), confidence)
    theirs = stats.bootstrap(
        (a - b,),
        np.mean,
        confidence_level=confidence,
        n_resamples=10_000,
        method="percentile",
        rng=draw,
    )
    # both are drawn: at 95 % their ends differ by 0.04 standard errors (one sigma)
    noise = 0.12 * theirs.standard_error
    assert ours.estimate == approx(float(np.mean(a - b)))
    for mine, wanted in zip((ours.low, ours.high), theirs.confidence_interval, strict=True):
        assert math.isclose(mine, wanted, abs_tol=noise)
