"""The records that flow through step_ray: plain frozen dataclasses, standard library only.

A `Task` becomes a `Trajectory` of `Step`s; a trajectory is read as chat `Message`s. Nothing here
knows about tokens, masks or storage: the loss mask is a policy over `StepKind` that is applied
when training examples are built (see dataset.py), so one collection serves every ablation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate

SCHEMA_VERSION = 1
"""Version of the trajectory record; readers refuse newer ones (see store.py)."""


class StepKind(StrEnum):
    """What a step is to the learner (delta_i of STeP's partial masking, arXiv 2505.20023)."""

    ACT = "act"
    """An ordinary step, judged good or not judged at all."""
    ERROR = "error"
    """The teacher judged it wrong; it stays in the text and is masked out of the loss."""
    SUBOPTIMAL = "suboptimal"
    """The teacher judged it wasteful; masked like an error unless configured otherwise."""
    CORRECTION = "correction"
    """Written by the teacher after an error: reflection, thought and action; trained."""
    UNJUDGED = "unjudged"
    """Executed, but the episode broke off before the teacher's verdict came; the last step if there
    is one, and never trained, whatever the policy."""


class Author(StrEnum):
    """Who wrote a step."""

    EXPERT = "expert"
    STUDENT = "student"
    TEACHER = "teacher"


class Source(StrEnum):
    """How a trajectory came about."""

    EXPERT = "expert"
    """Golden: written by the environment's expert."""
    STUDENT = "student"
    """The student alone (evaluation, or collection without a teacher)."""
    SELF_REFLECTED = "self_reflected"
    """The student with a teacher that reflects and corrects."""


class StopReason(StrEnum):
    """Why an episode ended. A failed episode is data, not an exception."""

    SUCCESS = "success"
    ENV_DONE = "env_done"
    MAX_STEPS = "max_steps"
    CONTEXT_LENGTH = "context_length"
    BAD_FORMAT = "bad_format"
    ENV_ERROR = "env_error"
    LLM_ERROR = "llm_error"
    TEACHER_ERROR = "teacher_error"
    TIMEOUT = "timeout"
    BUDGET = "budget"


ERROR_STOPS = frozenset(
    {StopReason.ENV_ERROR, StopReason.LLM_ERROR, StopReason.TEACHER_ERROR, StopReason.TIMEOUT}
)
"""Stops caused by the machinery, not by the agent: these episodes are played again on request."""

TRUNCATED_STOPS = frozenset({StopReason.MAX_STEPS, StopReason.CONTEXT_LENGTH, StopReason.BUDGET})
"""Stops caused by a limit."""


class VerdictLabel(StrEnum):
    """The teacher's judgement of one step."""

    GOOD = "good"
    ERROR = "error"
    SUBOPTIMAL = "suboptimal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Exactly what goes to an LLM; carries no training flags."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to do in one environment."""

    task_id: str
    """Stable across runs and machines: `alfworld/train/<game>`, never a list position."""
    env: str
    """Registry name of the environment."""
    split: str
    """Split that the task comes from (`train`, `valid_seen`, ...)."""
    goal: str
    """The goal as the environment words it; may be empty before the first reset."""
    task_type: str = ""
    """Group for the report, e.g. `pick_and_place_simple`."""
    params: Mapping[str, str] = field(default_factory=dict)
    """What the environment needs to load the task, e.g. `{"game": "<path>"}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the teacher says about one step; the last three fields are empty when it is good."""

    label: VerdictLabel
    reflection: str = ""
    """What went wrong, in the first person, as the agent would say it."""
    thought: str = ""
    """The thought that goes before the corrected action."""
    action: str = ""
    """The corrected action."""
    error_type: str = ""
    """Free label for the report, e.g. `no_op`, `wrong_object`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of the agent and what the environment answered."""

    index: int
    kind: StepKind
    author: Author
    text: str
    """The assistant message word for word, e.g. `Thought: ...\\nAction: ...`."""
    thought: str
    action: str
    observation: str | None = None
    """The environment's answer; None when the action was never executed."""
    reward: float = 0.0
    reflection: str | None = None
    """The reflection inside `text`, for corrections."""
    verdict: Verdict | None = None
    """The teacher's judgement of this step, where there was one."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Wall time of the step: LLM, teacher and environment together."""
    noop: bool | None = None
    """The environment did not carry the action out (not understood, or of no effect); None: it was
    never asked, or this is not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an episode cost."""

    env_steps: int = 0
    student_calls: int = 0
    teacher_calls: int = 0
    """Calls that were answered, re-asks included; of the oracle: judgements."""
    prompt_tokens: int = 0
    """Prompt tokens of the student's calls."""
    completion_tokens: int = 0
    teacher_prompt_tokens: int = 0
    teacher_completion_tokens: int = 0
    retries: int = 0
    """LLM requests that were sent again."""
    seconds: float = 0.0
    teacher_cached_calls: int = 0
    """Replies that were read from the cache: not among `teacher_calls`, without tokens or cost."""
    teacher_unstructured_calls: int = 0
    """Of `teacher_calls`: asked without a schema, because the endpoint refuses one."""
    cache_faults: int = 0
    """Entries of the teacher's cache that could not be read or written."""
    student_cost: float = 0.0
    """Money, by the price table of the run at the time."""
    teacher_cost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One finished episode, complete enough to rebuild every prompt that was sent."""

    trajectory_id: str
    """`<task_id>#<source>#<seed>`."""
    task: Task
    prompt: tuple[Message, ...]
    """Messages before the first step: instruction (system) and first observation (user)."""
    steps: tuple[Step, ...]
    reward: float
    """Final score: the sum of the steps' rewards."""
    success: bool
    """The task was solved, by the environment's own rule."""
    stop_reason: StopReason
    source: Source
    seed: int
    error: str | None = None
    """One line, when the stop reason is an error."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Role (`student`, `teacher`, `expert`) -> model name."""
    prompt_version: str = ""
    engine: str = ""
    """Environment engine and version."""
    usage: Usage = field(default_factory=Usage)
    schema_version: int = SCHEMA_VERSION
    producer: str = ""
    """`step_ray <version> <git revision>` that wrote the record."""
    best_reward: float = 0.0
    """Best score: the highest sum of rewards on the way; a wrong end does not lower it."""


def best_sum(steps: Iterable[Step]) -> float:
    """The highest sum of rewards after any of the steps, 0 at least."""
    return round(max(0.0, *accumulate((step.reward for step in steps), initial=0.0)), 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A point estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Outcome of one model on one list of tasks.

    `num_tasks = num_success + num_failed + num_truncated + num_errors`.
    """

    model: str
    num_tasks: int
    num_success: int
    num_failed: int
    num_truncated: int
    num_errors: int
    success_rate: Interval
    mean_reward: Interval
    mean_steps: float
    mean_invalid: float
    """Steps per episode that were unreadable or that the environment did not carry out."""
    stop_reasons: Mapping[str, int]
    by_task_type: Mapping[str, Interval]
    """Task type -> success rate."""
    seconds: float
    seed: int
    mean_best_reward: Interval | None = None
    """Mean of the best scores; None: not recorded."""
    behaviour: Mapping[str, Interval] = field(default_factory=dict)
    """Name -> mean over tasks, see behaviour.MEASURES."""
    scoring: str = "final"
    """Which score `mean_reward` is the mean of, see scores.SCORES."""
    reward_by_task_type: Mapping[str, Interval] = field(default_factory=dict)
    """Task type -> mean of that score; empty: not recorded."""
    by_split: Mapping[str, Interval] = field(default_factory=dict)
    """Split -> success rate; empty: not recorded."""
    reward_by_split: Mapping[str, Interval] = field(default_factory=dict)
    """Split -> mean of that score; empty: not recorded."""
