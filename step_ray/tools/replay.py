"""`step-ray replay`: stored actions played again, every observation compared byte for byte.

Takes trajectories and how to build their environments, gives counts and the first difference. An
episode that cannot be played is counted with its reason. It talks to no model and stores nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from step_ray.envs.base import TextEnv
from step_ray.errors import ConfigError, EnvError, StepRayError, boundary
from step_ray.types import Trajectory

MakeEnv = Callable[[Trajectory], TextEnv]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One place where the replay does not say what the record says."""

    trajectory_id: str
    place: str
    """`first observation`, `step 3`, or `outcome`."""
    action: str
    recorded: str
    replayed: str

    @property
    def offset(self) -> int:
        """The first byte that differs; a text that goes on differs where the other ends."""
        old, new = (
            text.encode("utf-8", "surrogatepass") for text in (self.recorded, self.replayed)
        )
        pairs = enumerate(zip(old, new, strict=False))
        return next((place for place, (a, b) in pairs if a != b), min(len(old), len(new)))


@dataclass(slots=True, kw_only=True)
class ReplayReport:
    """Counts over all episodes."""

    num_identical: int = 0
    """Episodes that repeat in full."""
    num_different: int = 0
    num_observations: int = 0
    """Observations that were compared, the first ones included."""
    num_observations_different: int = 0
    num_unexecuted: int = 0
    """Steps that never reached the environment: nothing to compare."""
    unplayed: Counter[str] = field(default_factory=Counter)
    """Reason -> episodes that broke off before any difference."""
    other_engines: Counter[str] = field(default_factory=Counter)
    """`recorded -> replayed` -> episodes; their engines have other names or versions."""
    first: Difference | None = None

    @property
    def ok(self) -> bool:
        """Every episode was played, and every one repeats."""
        return not self.num_different and not self.unplayed


def replay(trajectories: Iterable[Trajectory], make_env: MakeEnv) -> ReplayReport:
    """Play each episode once more and compare; differing episodes are played to their end."""
    report = ReplayReport()
    for trajectory in trajectories:
        one = _Replay(trajectory, report)
        try:
            one.run(make_env(trajectory))
        except StepRayError as exc:
            if one.same:
                report.unplayed[_reason(exc, trajectory)] += 1
                continue
        report.num_identical += one.same
        report.num_different += not one.same
    return report


def _reason(exc: StepRayError, trajectory: Trajectory) -> str:
    """The error without what is special to one episode, so that equal reasons add up."""
    line = str(exc)
    for value in trajectory.task.params.values():
        line = line.replace(value, "<path>") if "/" in value else line
    return line.removeprefix(f"{trajectory.task.task_id}: ")


class _Replay:
    """The replay of one episode."""

    def __init__(self, trajectory: Trajectory, report: ReplayReport) -> None:
        self._trajectory, self._report = trajectory, report
        self.same = True
        """Nothing has differed yet."""

    def run(self, env: TextEnv) -> None:
        """Play the episode to its end.

        Raises:
            EnvError: the environment fails on the way.
        """
        task, recorded = self._trajectory.task, self._trajectory.engine
        if recorded and recorded != env.engine:
            self._report.other_engines[f"{recorded} -> {env.engine}"] += 1
        try:
            with boundary(EnvError, f"{task.env} replay"):
                self._play(env)
        finally:
            env.close()

    def _play(self, env: TextEnv) -> None:
        trajectory = self._trajectory
        if not trajectory.prompt:
            raise EnvError(f"{trajectory.task.task_id}: it has no first observation")
        first = env.reset(trajectory.task)
        self._compare("first observation", "", trajectory.prompt[-1].content, first)
        reward, success = 0.0, False
        for step in trajectory.steps:
            if step.observation is None or not step.action:
                self._report.num_unexecuted += 1
                continue
            answer = env.step(step.action)
            self._compare(f"step {step.index}", step.action, step.observation, answer.observation)
            reward, success = reward + answer.reward, answer.success
        if trajectory.steps and trajectory.steps[-1].observation is None:
            return  # imported: whether the last action was executed is not recorded
        recorded = (trajectory.success, round(trajectory.reward, 6))
        self._check("outcome", "", _outcome(*recorded), _outcome(success, round(reward, 6)))

    def _compare(self, place: str, action: str, recorded: str, replayed: str) -> None:
        self._report.num_observations += 1
        same = self._check(place, action, recorded, replayed)
        self._report.num_observations_different += not same

    def _check(self, place: str, action: str, recorded: str, replayed: str) -> bool:
        if recorded == replayed:
            return True
        self.same = False
        self._report.first = self._report.first or Difference(
            trajectory_id=self._trajectory.trajectory_id,
            place=place,
            action=action,
            recorded=recorded,
            replayed=replayed,
        )
        return False


def _outcome(success: bool, reward: float) -> str:
    return f"{'solved' if success else 'not solved'}, reward {reward:g}"


def moved(trajectory: Trajectory, prefixes: Mapping[str, str]) -> Trajectory:
    """The trajectory with the paths of its task's params moved: old prefix -> new prefix."""
    params = dict(trajectory.task.params)
    for key, value in params.items():
        for old, new in prefixes.items():
            if value == old or value.startswith(old.rstrip("/") + "/"):
                params[key] = new.rstrip("/") + value[len(old.rstrip("/")) :]
                break
    return replace(trajectory, task=replace(trajectory.task, params=params))


def parse_moves(moves: Iterable[str]) -> dict[str, str]:
    """Read `OLD=NEW` pairs.

    Raises:
        ConfigError: one is not of that form.
    """
    pairs = [move.partition("=") for move in moves]
    for old, sign, new in pairs:
        if not (old and sign and new):
            raise ConfigError(f"--moved: {old + sign + new!r} is not of the form OLD=NEW")
    return {old: new for old, _, new in pairs}
