"""Intervals and paired tests for evaluations: standard library and numpy only.

Takes outcomes or trajectories, gives intervals and paired differences. Tasks
are the independent units throughout: several episodes of one task (seeds) are averaged before
anything is estimated, otherwise repeating an easy task would narrow the interval
(Miller 2024, arXiv 2411.00640, clustered errors). It never reads files and never drops an
episode: one that ended in an error counts as not solved.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from step_ray.errors import DataError
from step_ray.evaluation.scores import final_score
from step_ray.types import Interval, Trajectory

NUM_RESAMPLES = 10_000
"""Resamples of the bootstrap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How much better a is than b on the same tasks; positive when a is better."""

    estimate: float
    """Mean over tasks of a - b."""
    low: float
    high: float
    p_value: float
    num_tasks: int
    num_only_a: int
    """Tasks on which a is better (binary outcomes: solved by a only)."""
    num_only_b: int
    """Tasks on which b is better."""
    confidence: float = 0.95


def wilson_interval(num_success: float, num_tasks: int, confidence: float) -> Interval:
    """Score interval of a proportion.

    With p = num_success / n and z the normal quantile of (1 + confidence) / 2:
    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Wilson 1927, JASA 22:209; chosen
    because it stays inside [0, 1] and keeps its coverage near 0 and 1 (Brown, Cai & DasGupta
    2001, Statistical Science 16:101). A fractional `num_success` (sum of per-task means over
    seeds) makes it conservative: a value in [0, 1] with mean p has variance at most p(1-p).

    Raises:
        DataError: no tasks, or more successes than tasks.
    """
    if num_tasks < 1 or not 0 <= num_success <= num_tasks:
        raise DataError(f"interval: {num_success} successes of {num_tasks} tasks is no proportion")
    rate = num_success / num_tasks
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    shrink = 1 + z * z / num_tasks
    centre = (rate + z * z / (2 * num_tasks)) / shrink
    spread = math.sqrt(rate * (1 - rate) / num_tasks + (z / (2 * num_tasks)) ** 2)
    half = z / shrink * spread
    # At 0 and n one end is exactly the estimate; rounding must not push it past.
    return Interval(
        estimate=rate,
        low=max(0.0, min(rate, centre - half)),
        high=min(1.0, max(rate, centre + half)),
        confidence=confidence,
    )


def mean_interval(values: Sequence[float], confidence: float) -> Interval:
    """Student-t interval of a mean: mean ± t(n-1) s / sqrt(n), s with n - 1 (Student 1908).

    A single value says nothing about its spread: its interval is (-inf, inf).

    Raises:
        DataError: no values.
    """
    if not values:
        raise DataError("interval: no values to average; evaluate at least one task")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(estimate=mean, low=-math.inf, high=math.inf, confidence=confidence)
    deviation = float(np.std(np.asarray(values, dtype=np.float64), ddof=1))
    half = t_quantile(confidence, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(estimate=mean, low=mean - half, high=mean + half, confidence=confidence)


def t_quantile(confidence: float, df: int) -> float:
    """The t with P(-t < T < t) = confidence, T Student-distributed with `df` >= 1 degrees.

    Bisection on theta = atan(t / sqrt(df)) of the finite series of Abramowitz & Stegun 1964,
    26.7.3 (odd df) and 26.7.4 (even df), which are exact for whole df.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        low, high = (theta, high) if _central_t(theta, df) < confidence else (low, theta)
    return math.tan(low) * math.sqrt(df)


def _central_t(theta: float, df: int) -> float:
    """P(-t < T < t) for t = sqrt(df) tan(theta); A&S 26.7.3 and 26.7.4."""
    sin, cos = math.sin(theta), math.cos(theta)
    even = df % 2 == 0
    k = np.arange(1, df // 2)
    # Each term of the series is the one before times cos^2 (2k-1)/2k, or cos^2 2k/(2k+1).
    ratios = cos * cos * ((2 * k - 1) / (2 * k) if even else 2 * k / (2 * k + 1))
    terms = 1.0 + float(np.sum(np.cumprod(ratios)))
    if even:
        return sin * terms
    return 2 / math.pi * (theta + (sin * cos * terms if df > 1 else 0.0))


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], confidence: float, seed: int = 0
) -> PairedDifference:
    """Mean of a - b over tasks, its bootstrap interval, and an exact test of no difference.

    Interval: percentile bootstrap that resamples tasks (Efron & Tibshirani 1993, ch. 13),
    `NUM_RESAMPLES` draws. It has zero width when all tasks differ by the same amount. p-value:
    two-sided exact sign test over the tasks on which a and b differ, min(1, 2 P(X <= k)) with
    X ~ Bin(m, 1/2), k the smaller count; for binary outcomes this is the exact McNemar test
    (McNemar 1947, Psychometrika 12:153). The two are computed apart and may disagree at the edge.

    Args:
        a: Outcome per task id, averaged over the seeds of the task (see `success_by_task`).
        b: The same tasks under the other model.
        confidence: Coverage of the interval.
        seed: Seed of the bootstrap.

    Raises:
        DataError: no tasks, or not the same tasks.
    """
    if a.keys() != b.keys() or not a:
        odd = len(a.keys() ^ b.keys())
        raise DataError(f"comparison: {odd} of {len(a.keys() | b.keys())} tasks are not in both")
    differences = np.array([a[task] - b[task] for task in sorted(a)], dtype=np.float64)
    # Always resampled with the better model first, so that swapping a and b mirrors the interval.
    sign = -1.0 if differences.sum() < 0 else 1.0
    # Drawing counts of the distinct values equals drawing tasks, with far less memory.
    values, counts = np.unique(sign * differences, return_counts=True)
    num = len(differences)
    draws = np.random.default_rng(seed).multinomial(num, counts / num, size=NUM_RESAMPLES)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = sorted(sign * np.quantile(draws @ values / num, tails))
    num_only_a, num_only_b = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    return PairedDifference(
        estimate=float(sign * (counts @ values) / num),
        low=float(low),
        high=float(high),
        p_value=_sign_test(num_only_a, num_only_b),
        num_tasks=num,
        num_only_a=num_only_a,
        num_only_b=num_only_b,
        confidence=confidence,
    )


def _sign_test(num_a: int, num_b: int) -> float:
    total = num_a + num_b
    tail = sum(math.comb(total, i) for i in range(min(num_a, num_b) + 1))
    return min(1.0, float(2 * tail / 2**total))


def success_by_task(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Share of the episodes of each task that succeeded, by task id: 0 or 1 with one seed."""
    return mean_by_task((t.task.task_id, float(t.success)) for t in trajectories)


def score_by_task(
    trajectories: Iterable[Trajectory], score: Callable[[Trajectory], float] = final_score
) -> dict[str, float]:
    """Mean score of each task over its episodes, by task id."""
    return mean_by_task((t.task.task_id, score(t)) for t in trajectories)


def mean_by_task(outcomes: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Mean of the values of each task, by task id."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for task_id, value in outcomes:
        by_task[task_id].append(value)
    return {task_id: math.fsum(vs) / len(vs) for task_id, vs in by_task.items()}


def success_interval(trajectories: Sequence[Trajectory], confidence: float) -> Interval:
    """Wilson interval of the success rate, clustered by task.

    Raises:
        DataError: no trajectories.
    """
    rates = success_by_task(trajectories)
    return wilson_interval(math.fsum(rates.values()), len(rates), confidence)
