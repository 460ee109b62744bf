"""What an episode is worth: its success, its final score, its best score, and ETO's score.

Takes trajectories, gives numbers; success is the environment's own and is never derived here.
"""

from collections.abc import Callable
from types import MappingProxyType

from step_ray.types import StopReason, Trajectory


def final_score(trajectory: Trajectory) -> float:
    """The score that the episode ends with: the sum of its rewards."""
    return trajectory.reward


def best_score(trajectory: Trajectory) -> float:
    """The highest score on the way; a wrong end does not lower it."""
    return trajectory.best_reward


def eto_score(trajectory: Trajectory) -> float:
    """The score as ETO's released ScienceWorld loop counts it (arXiv 2403.02502).

    The highest score seen, a lost task counting -1 only if it is the first thing seen, and an
    unreadable answer starting again from 0. For comparison with its published averages only: an
    episode that ends wrong keeps its credit.
    """
    score: float | None = None
    total = 0.0
    for step in trajectory.steps:
        if not step.action:
            score = 0.0
        if not step.action or step.observation is None:
            continue
        total += step.reward
        lost = trajectory.stop_reason is StopReason.ENV_DONE and step is trajectory.steps[-1]
        now = -1.0 if lost else round(total, 6)
        score = now if score is None or now > score else score
    return score or 0.0


SCORES: MappingProxyType[str, Callable[[Trajectory], float]] = MappingProxyType(
    {"final": final_score, "eto": eto_score}
)
"""Values of `env.scienceworld.scoring` -> the score that a report shows."""
