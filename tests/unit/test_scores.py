"""What an episode is worth: final, best, and ETO's count; each case counted by hand."""

import pytest
from builders import make_step, make_trajectory

from step_ray.evaluation.scores import best_score, eto_score, final_score
from step_ray.types import StopReason, best_sum


def episode(*rewards, stop=StopReason.MAX_STEPS, unreadable=()):
    steps = [
        make_step(index=i, reward=reward, action="" if i in unreadable else "look")
        for i, reward in enumerate(rewards)
    ]
    return make_trajectory(
        *steps, reward=round(sum(rewards), 6), best_reward=best_sum(steps), stop_reason=stop
    )


@pytest.mark.parametrize(
    ("trajectory", "final", "best", "eto"),
    [
        (episode(), 0.0, 0.0, 0.0),
        (episode(0.25, 0.5), 0.75, 0.75, 0.75),
        # a wrong focus: the score falls to 0, ETO keeps the best
        (episode(0.25, 0.5, -0.75, stop=StopReason.ENV_DONE), 0.0, 0.75, 0.75),
        # a wrong focus as the first action: ETO has seen nothing but -1
        (episode(0.0, stop=StopReason.ENV_DONE), 0.0, 0.0, -1.0),
        # an unreadable answer sets ETO's count back, until the next action sees the score again
        (episode(0.5, 0.0, unreadable=(1,)), 0.5, 0.5, 0.0),
        (episode(0.5, 0.0, 0.0, unreadable=(1,)), 0.5, 0.5, 0.5),
    ],
)
def test_final_best_and_etos_score(trajectory, final, best, eto):
    scores = [score(trajectory) for score in (final_score, best_score, eto_score)]
    assert scores == [final, best, eto]


def test_sums_of_hundredths_are_exact():
    assert episode(*[0.07] * 14, 0.02).best_reward == 1.0
