"""The evaluation of one model as one record: counts, scores, behaviour.

Takes the trajectories of a model, gives an `EvalReport`. It estimates nothing itself (stats.py,
behaviour.py), and it drops no episode.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from step_ray.errors import DataError
from step_ray.evaluation.behaviour import behaviour, num_invalid
from step_ray.evaluation.scores import SCORES, best_score
from step_ray.evaluation.stats import mean_interval, score_by_task, success_interval
from step_ray.types import ERROR_STOPS, TRUNCATED_STOPS, EvalReport, Interval, Trajectory


def summarize(
    model: str,
    trajectories: Sequence[Trajectory],
    confidence: float,
    seconds: float,
    seed: int,
    scoring: str = "final",
) -> EvalReport:
    """The evaluation of one model: counts over episodes, intervals over tasks.

    Each episode is counted once: as a success, else by its stop reason as an error, as truncated,
    or as failed. With one seed `num_tasks` is the number of tasks, with several of episodes.

    Args:
        model: Name of the arm.
        trajectories: One per task and seed.
        confidence: Coverage of the intervals.
        seconds: Wall time of the evaluation.
        seed: First seed of the evaluation.
        scoring: Which score the mean reward is of, see scores.SCORES.

    Raises:
        DataError: no trajectories, or one twice.
    """
    _check_unique(model, trajectories)
    groups = Counter(outcome(t) for t in trajectories)
    num = len(trajectories)
    score = SCORES[scoring]
    by_type = _grouped(trajectories, lambda t: t.task.task_type)
    by_split = _grouped(trajectories, lambda t: t.task.split)
    return EvalReport(
        model=model,
        num_tasks=num,
        num_success=groups["success"],
        num_failed=groups["failed"],
        num_truncated=groups["truncated"],
        num_errors=groups["error"],
        success_rate=success_interval(trajectories, confidence),
        mean_reward=_mean_score(trajectories, score, confidence),
        mean_best_reward=_mean_score(trajectories, best_score, confidence),
        scoring=scoring,
        mean_steps=sum(len(t.steps) for t in trajectories) / num,
        mean_invalid=sum(num_invalid(t) for t in trajectories) / num,
        behaviour=behaviour(trajectories, confidence),
        stop_reasons=dict(Counter(t.stop_reason.value for t in trajectories).most_common()),
        by_task_type={k: success_interval(v, confidence) for k, v in by_type.items()},
        reward_by_task_type={k: _mean_score(v, score, confidence) for k, v in by_type.items()},
        by_split={k: success_interval(v, confidence) for k, v in by_split.items()},
        reward_by_split={k: _mean_score(v, score, confidence) for k, v in by_split.items()},
        seconds=seconds,
        seed=seed,
    )


def _grouped(
    trajectories: Sequence[Trajectory], key: Callable[[Trajectory], str]
) -> dict[str, list[Trajectory]]:
    """The trajectories by a name, the names in their order."""
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        groups[key(trajectory)].append(trajectory)
    return dict(sorted(groups.items()))


def _mean_score(
    trajectories: Sequence[Trajectory], score: Callable[[Trajectory], float], confidence: float
) -> Interval:
    return mean_interval(list(score_by_task(trajectories, score).values()), confidence)


def _check_unique(model: str, trajectories: Sequence[Trajectory]) -> None:
    if not trajectories:
        raise DataError(f"evaluation: {model!r} has no trajectories; evaluate at least one task")
    name, count = Counter(t.trajectory_id for t in trajectories).most_common(1)[0]
    if count > 1:
        raise DataError(f"evaluation: {model!r} has trajectory {name!r} {count} times; keep one")


def outcome(trajectory: Trajectory) -> str:
    """`success`, `error`, `truncated` or `failed`: as what an episode is counted."""
    if trajectory.success:
        return "success"
    if trajectory.stop_reason in ERROR_STOPS:
        return "error"
    return "truncated" if trajectory.stop_reason in TRUNCATED_STOPS else "failed"
