"""The line of a running stage; the clock is a number."""

from dataclasses import replace

import pytest
from test_failures import episode

from step_ray.collection.tally import Tally, duration
from step_ray.progress import plain_wait_s
from step_ray.store import Outcome
from step_ray.types import Author, Step, StepKind, StopReason, Usage


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def taught(stop=StopReason.SUCCESS, corrections=0, tokens=0, cost=0.0):
    step = Step(
        index=0, kind=StepKind.CORRECTION, author=Author.TEACHER, text="", thought="", action=""
    )
    return replace(
        episode(stop),
        steps=(step,) * corrections,
        models={"student": "s", "teacher": "t"},
        usage=Usage(completion_tokens=tokens, teacher_completion_tokens=tokens, teacher_cost=cost),
    )


def test_all_is_in_the_line():
    clock = Clock()
    tally = Tally(total=10, money=50, clock=clock)
    tally.begin()
    clock.now += 60
    tally.add(Outcome.of(taught(corrections=3, tokens=300, cost=0.5)))
    tally.add(Outcome.of(taught(StopReason.TEACHER_ERROR, tokens=300, cost=0.75)))
    # 1,200 tokens in 60 s; 8 to go at 30 s each
    assert tally.line() == (
        "1 won, 1 failed (teacher_error 1), 1.5 corrections each, 20 tokens/s, cost 1.25 of 50,"
        " 4 min 0 s left"
    )


def test_what_was_there_counts_and_says_nothing_about_speed():
    clock = Clock()
    tally = Tally(total=10, clock=clock)
    for _ in range(4):
        tally.add(Outcome.of(taught(tokens=1000, cost=1)))
    tally.begin()
    assert (tally.seconds_left, tally.line()) == (
        None,
        "4 won, 0 failed, 0.0 corrections each, cost 4.00",
    )
    clock.now += 10
    tally.add(Outcome.of(taught(tokens=50)))
    assert (tally.tokens_per_s, tally.seconds_left) == (10.0, 50.0)


def test_without_a_teacher_tokens_or_prices_the_line_is_short():
    tally = Tally(total=1)
    tally.begin()
    tally.add(Outcome.of(episode(StopReason.MAX_STEPS)))
    assert tally.line() == "0 won, 0 failed"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.4, "4 s"), (75, "1 min 15 s"), (600, "10 min"), (7380, "2 h 3 min")],
)
def test_a_time_to_wait_is_short(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("elapsed", "wait"), [(0, 5), (250, 5), (1000, 20), (10**5, 60)])
def test_a_long_run_prints_fewer_lines(elapsed, wait):
    assert plain_wait_s(elapsed) == wait
