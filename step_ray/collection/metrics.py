"""The same counts as the terminal shows, as Ray metrics (Prometheus scrapes them from the nodes).

Takes outcomes of episodes on the driver, records `ray_step_ray_*` series. Tags have few values:
the stage, the stop reason, the role; never a task. Where Ray does not run, nothing is recorded.
"""

from step_ray.collection.tally import Tally
from step_ray.store import Outcome


class EpisodeMetrics:
    """Ray metrics of one stage; Ray must be running."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._tags = {"stage": stage}
        self._episodes = Counter(
            "step_ray_episodes", "Episodes that ended.", ("stage", "stop_reason")
        )
        self._corrections = Counter(
            "step_ray_corrections", "Steps that the teacher wrote.", ("stage",)
        )
        self._tokens = Counter(
            "step_ray_tokens", "Tokens of episodes that ended.", ("stage", "role", "kind")
        )
        self._cost = Counter("step_ray_cost", "Money, by the price table.", ("stage", "role"))
        self._done = Gauge("step_ray_episodes_done", "Episodes on disk or on the way.", ("stage",))
        self._left = Gauge(
            "step_ray_seconds_left", "Until the stage is done, at its pace so far.", ("stage",)
        )

    def add(self, outcome: Outcome) -> None:
        """Count an episode that ended now."""
        usage, tags = outcome.usage, self._tags
        self._episodes.inc(1, {**tags, "stop_reason": outcome.stop_reason.value})
        _inc(self._corrections, outcome.num_corrections, tags)
        for role, kind, count in (
            ("student", "prompt", usage.prompt_tokens),
            ("student", "completion", usage.completion_tokens),
            ("teacher", "prompt", usage.teacher_prompt_tokens),
            ("teacher", "completion", usage.teacher_completion_tokens),
        ):
            _inc(self._tokens, count, {**tags, "role": role, "kind": kind})
        _inc(self._cost, usage.student_cost, {**tags, "role": "student"})
        _inc(self._cost, usage.teacher_cost, {**tags, "role": "teacher"})

    def show(self, tally: Tally) -> None:
        """Where the stage stands."""
        self._done.set(tally.num_done, self._tags)
        if tally.seconds_left is not None:
            self._left.set(tally.seconds_left, self._tags)


def _inc(counter: "object", amount: float, tags: dict[str, str]) -> None:
    if amount > 0:  # Ray refuses to add nothing
        counter.inc(amount, tags)  # type: ignore[attr-defined]
