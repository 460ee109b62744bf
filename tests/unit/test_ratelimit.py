"""Rates: no minute holds more requests than the limit, whenever they are asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_ray.calls.ratelimit import RateLimiter

gaps = st.lists(st.floats(0, 30), min_size=1, max_size=60)


def starts_of(limiter, gaps, tokens=0):
    now, starts = 0.0, []
    for gap in gaps:
        now += gap
        starts.append(limiter.reserve(now, tokens))
    return starts


def test_without_limits_a_request_starts_at_once():
    limiter = RateLimiter(None, None)
    assert starts_of(limiter, [1.0, 0.0, 0.0], tokens=10**6) == [1.0, 1.0, 1.0]


def test_requests_are_spaced_evenly():
    assert starts_of(RateLimiter(30, None), [5.0, 0.0, 0.0, 10.0]) == [5.0, 7.0, 9.0, 15.0]


def test_a_request_waits_until_the_tokens_before_it_are_paid_off():
    limiter = RateLimiter(None, 600)  # 10 a second
    assert [limiter.reserve(0.0, tokens) for tokens in (50, 20, 0)] == [0.0, 5.0, 7.0]


def test_the_stricter_limit_decides():
    limiter = RateLimiter(60, 600)
    assert [limiter.reserve(0.0, tokens) for tokens in (5, 30, 5)] == [0.0, 1.0, 4.0]


@pytest.mark.parametrize(("actual", "start"), [(10, 1.0), (90, 9.0)])
def test_tokens_are_corrected_when_the_answer_has_come(actual, start):
    limiter = RateLimiter(None, 600)
    limiter.reserve(0.0, 50)
    limiter.correct(actual - 50)
    assert limiter.next_start(0.0) == pytest.approx(start)


def test_nothing_starts_in_a_pause_and_a_shorter_one_does_not_end_it():
    limiter = RateLimiter(60, None)
    limiter.pause(20.0)
    limiter.pause(5.0)
    assert starts_of(limiter, [1.0, 0.0]) == [20.0, 21.0]


def test_looking_takes_no_turn():
    limiter = RateLimiter(60, None)
    assert [limiter.next_start(3.0) for _ in range(3)] == [3.0] * 3


@given(gaps=gaps, limit=st.integers(1, 100))
def test_no_minute_holds_more_requests_than_the_limit(gaps, limit):
    starts = starts_of(RateLimiter(limit, None), gaps)
    for first in starts:
        # a hair less than a minute: sums of floats
        assert sum(first <= start < first + 60 - 1e-6 for start in starts) <= limit


@given(gaps=gaps, tokens=st.integers(1, 500))
def test_no_minute_holds_more_tokens_than_the_limit_and_one_request(gaps, tokens):
    starts = starts_of(RateLimiter(None, 1000), gaps, tokens)
    for first in starts:
        held = sum(first <= start < first + 60 - 1e-6 for start in starts) * tokens
        assert held <= 1000 + tokens
