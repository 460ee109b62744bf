"""How an agent behaves, beside whether it wins: what the method is meant to change.

Takes trajectories of one model, gives means over tasks with intervals. It judges nothing itself:
an invalid action is one that the environment called so, an unreadable answer one that the episode
loop could not parse.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from step_ray.evaluation.stats import mean_by_task, mean_interval
from step_ray.types import Interval, Step, StepKind, Trajectory

NOOP_TEXTS = frozenset({"Nothing happens.", "No known action matches that input."})
"""What tells a no-op in records that were written before no-ops were recorded."""
LOOKING_BACK = re.compile(
    r"\b(mistake|wrong|should(?: not)? have|did nothing|nothing happen\w*|did not work|"
    r"failed|instead|not what I)\b",
    re.IGNORECASE,
)
"""Words of a thought that looks back at an error. A rule of thumb that counts the same for all
models; it is no measure of how good a reflection is."""


def is_invalid(step: Step) -> bool:
    """The answer was unreadable, or the environment did not carry its action out."""
    if not step.action:
        return True
    if step.noop is not None:
        return step.noop
    return (step.observation or "").strip() in NOOP_TEXTS


def num_invalid(trajectory: Trajectory) -> int:
    """Steps of `is_invalid`."""
    return sum(map(is_invalid, trajectory.steps))


def invalid_share(trajectory: Trajectory) -> float | None:
    """Share of invalid steps; None without steps."""
    return num_invalid(trajectory) / len(trajectory.steps) if trajectory.steps else None


def num_looping(trajectory: Trajectory) -> int:
    """Steps in a loop: an action with its answer that repeats, at once or in turn with another."""
    said = [(step.action, step.observation) for step in trajectory.steps]
    return sum(
        said[i - 1 : i] == [said[i]] or (i > 2 and said[i - 3 : i - 1] == said[i - 1 : i + 1])
        for i in range(len(said))
    )


def num_reflections(trajectory: Trajectory) -> int:
    """Steps of the agent whose thought looks back at an error (see `LOOKING_BACK`)."""
    return sum(bool(LOOKING_BACK.search(step.thought)) for step in trajectory.steps)


def recovered_share(trajectory: Trajectory) -> float | None:
    """Share of invalid steps whose next step is valid; the episode's last step does not count.

    None when there is no such step.
    """
    steps = trajectory.steps
    after = [not is_invalid(new) for old, new in pairwise(steps) if is_invalid(old)]
    return sum(after) / len(after) if after else None


def steps_to_success(trajectory: Trajectory) -> float | None:
    """Executed steps of a solved episode."""
    executed = [s for s in trajectory.steps if s.kind is not StepKind.UNJUDGED]
    return float(len(executed)) if trajectory.success else None


MEASURES: Mapping[str, Callable[[Trajectory], float | None]] = {
    "invalid_share": invalid_share,
    "looping_steps": num_looping,
    "reflections": num_reflections,
    "recovered_share": recovered_share,
    "steps_to_success": steps_to_success,
}
"""Name -> its value for one episode; None: the episode has none and does not count."""


def behaviour(trajectories: Sequence[Trajectory], confidence: float) -> dict[str, Interval]:
    """Each measure's mean over tasks with its Student-t interval.

    A measure that no episode has is left out. Several episodes of a task are averaged first, see
    stats.py.
    """
    means = {}
    for name, measure in MEASURES.items():
        pairs = ((t.task.task_id, measure(t)) for t in trajectories)
        by_task = mean_by_task((task, float(value)) for task, value in pairs if value is not None)
        if by_task:
            means[name] = mean_interval(list(by_task.values()), confidence)
    return means
