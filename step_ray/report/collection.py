"""What a report says about a collection: counts over its episodes, and a few of them to read.

Takes trajectories one by one, keeps counts, one number per task and some examples.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable

from step_ray.types import StepKind, Trajectory, VerdictLabel

NUM_EXAMPLES_SHOWN = 3


class CollectionCounts:
    """Adds up the episodes of a collection, kept or not."""

    def __init__(self) -> None:
        self.num_episodes = self.num_success = 0
        self.teacher_calls = self.teacher_tokens = self.teacher_cached_calls = self.env_steps = 0
        self.money = 0.0
        """Paid for student and teacher, by the price table."""
        self.stops: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        """Error type -> steps that the teacher found faulty."""
        self.corrections: Counter[int] = Counter()
        """Corrections of an episode -> episodes."""
        self._by_task: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._examples: list[Trajectory] = []

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> "CollectionCounts":
        """The counts of these, gone through once."""
        counts = cls()
        for trajectory in trajectories:
            counts.add(trajectory)
        return counts

    def add(self, trajectory: Trajectory) -> None:
        """Count one episode."""
        usage, steps = trajectory.usage, trajectory.steps
        self.num_episodes += 1
        self.num_success += trajectory.success
        self.teacher_calls += usage.teacher_calls
        self.teacher_tokens += usage.teacher_prompt_tokens + usage.teacher_completion_tokens
        self.teacher_cached_calls += usage.teacher_cached_calls
        self.env_steps += usage.env_steps
        self.money += usage.teacher_cost + usage.student_cost
        self.stops[trajectory.stop_reason.value] += 1
        verdicts = [step.verdict for step in steps if step.verdict]
        self.verdicts.update(v.label.value for v in verdicts)
        faults = (v for v in verdicts if v.label is not VerdictLabel.GOOD)
        self.faults.update(v.error_type or "(none)" for v in faults)
        self.corrections[sum(step.kind is StepKind.CORRECTION for step in steps)] += 1
        task = self._by_task[trajectory.task.task_id]
        task[0] += trajectory.success
        task[1] += 1
        self._consider(trajectory)

    @property
    def num_corrections(self) -> int:
        """Over all episodes."""
        return sum(count * number for count, number in self.corrections.items())

    def success_by_task(self) -> list[float]:
        """The share of the episodes of each task that succeeded."""
        return [won / played for won, played in self._by_task.values()]

    def examples(self) -> list[Trajectory]:
        """Episodes with an error and a correction: solved and short first, types mixed."""
        order = {t.trajectory_id: t for t in [*self._first_of_types(), *self._examples]}
        return list(order.values())[:NUM_EXAMPLES_SHOWN]

    def _consider(self, trajectory: Trajectory) -> None:
        """Keep the best of each type and the best of all: more are never shown."""
        if {step.kind for step in trajectory.steps} >= {StepKind.ERROR, StepKind.CORRECTION}:
            self._examples.append(trajectory)
            self._examples.sort(key=lambda t: (not t.success, len(t.steps), t.trajectory_id))
            kept = [*self._examples[:NUM_EXAMPLES_SHOWN], *self._first_of_types()]
            ids = {t.trajectory_id for t in kept}
            self._examples = [t for t in self._examples if t.trajectory_id in ids]

    def _first_of_types(self) -> list[Trajectory]:
        firsts: dict[str, Trajectory] = {}
        for trajectory in self._examples:
            firsts.setdefault(trajectory.task.task_type, trajectory)
        return list(firsts.values())
