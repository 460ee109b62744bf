"""The one episode loop, for golden play, collection and evaluation alike.

Takes a task, an environment, a student and maybe a teacher; gives a `Trajectory`. It never raises
for what happens inside an episode: a failed episode is data with a stop reason. It knows nothing
of Ray, tokens or masks.

With a teacher this is step 2 of STeP (arXiv 2505.20023): each step of the student is judged; after
an error the teacher's reflection and correction follow, executed from the state the error left;
the error stays in the text. Then the student goes on.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from step_ray import __version__
from step_ray.calls.meter import Meter
from step_ray.collection.judging import StepView
from step_ray.envs.base import EnvStep, TextEnv
from step_ray.errors import (
    BudgetError,
    ContextLengthError,
    EnvError,
    LLMError,
    StepRayError,
    TeacherError,
    boundary,
)
from step_ray.llm import ChatModel
from step_ray.react import (
    Turn,
    conversation,
    format_correction,
    initial_messages,
    parse_turn,
    parse_turns,
)
from step_ray.teacher import Teacher
from step_ray.types import (
    Author,
    Message,
    Source,
    Step,
    StepKind,
    StopReason,
    Task,
    Trajectory,
    Usage,
    Verdict,
    VerdictLabel,
    best_sum,
)

FORMAT_NOTICE = "Your answer could not be read. Give one Thought and one Action."
"""What the student reads after an answer without exactly one action."""

KIND_OF_VERDICT = {
    VerdictLabel.GOOD: StepKind.ACT,
    VerdictLabel.ERROR: StepKind.ERROR,
    VerdictLabel.SUBOPTIMAL: StepKind.SUBOPTIMAL,
}
STOP_OF_ERROR: tuple[tuple[type[StepRayError], StopReason], ...] = (
    (EnvError, StopReason.ENV_ERROR),
    (ContextLengthError, StopReason.CONTEXT_LENGTH),
    (LLMError, StopReason.LLM_ERROR),
    (TeacherError, StopReason.TEACHER_ERROR),
    (BudgetError, StopReason.BUDGET),
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """Limits and rules of an episode."""

    prompt: str
    """Instruction version, see react.load_prompt."""
    max_steps: int = 40
    max_steps_by_type: Mapping[str, int] = field(default_factory=dict)
    """Assistant turns per episode, corrections included: in general, and by task type."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    max_format_errors: int = 3
    """Unreadable answers in a row before the episode ends; with a teacher they are corrected."""
    max_corrections: int = 5
    before_execution: bool = False
    """Judge before executing; an error then stays in the text unexecuted."""
    reflection: bool = True
    show_admissible: bool = True
    step_timeout_s: float = 300.0
    episode_timeout_s: float = 3600.0

    def limit(self, task: Task) -> int:
        """Assistant turns for an episode of this task."""
        return self.max_steps_by_type.get(task.task_type, self.max_steps)


async def run_episode(
    task: Task,
    env: TextEnv,
    student: ChatModel,
    *,
    settings: EpisodeSettings,
    source: Source,
    teacher: Teacher | None = None,
    seed: int = 0,
    reference: tuple[Step, ...] = (),
    executor: Executor | None = None,
) -> Trajectory:
    """Play one episode to its end.

    Args:
        task: what to do; `env.reset` loads it.
        env: called from `executor` only, one call at a time.
        student: acts.
        settings: limits and rules.
        source: how the trajectory is labelled.
        teacher: judges and corrects; None: the student is alone.
        seed: seed of the student's sampling.
        reference: a golden trajectory to show the teacher.
        executor: where the blocking environment runs (default: the loop's thread pool).

    Returns:
        The trajectory. Only cancellation is raised.
    """
    episode = _Episode(task, env, student, settings, teacher, seed, reference, executor)
    started = time.monotonic()
    error: str | None = None
    try:
        async with asyncio.timeout(settings.episode_timeout_s):
            stop = await episode.play()
    except TimeoutError:
        stop, error = StopReason.TIMEOUT, f"no end within {settings.episode_timeout_s:g} s"
    except StepRayError as exc:
        stop = next((s for kind, s in STOP_OF_ERROR if isinstance(exc, kind)), StopReason.ENV_ERROR)
        error = str(exc)
    usage = replace(episode.meter.usage, seconds=time.monotonic() - started)
    return episode.trajectory(source, stop, error, usage)


class _Episode:
    """The state of one running episode."""

    def __init__(
        self,
        task: Task,
        env: TextEnv,
        student: ChatModel,
        settings: EpisodeSettings,
        teacher: Teacher | None,
        seed: int,
        reference: tuple[Step, ...],
        executor: Executor | None,
    ) -> None:
        self._task, self._env, self._student, self._settings = task, env, student, settings
        self._teacher, self._seed, self._reference = teacher, seed, reference
        self._executor = executor
        self._prompt: tuple[Message, ...] = ()
        self._steps: list[Step] = []
        self._reward = 0.0
        self._success = False
        self._corrections = 0
        self._format_errors = 0
        self.meter = Meter()

    async def play(self) -> StopReason:
        """Reset, then take turns until something ends the episode."""
        observation = await self._call(self._env.reset, self._task)
        self._prompt = initial_messages(self._settings.prompt, observation)
        stop: StopReason | None = None
        while stop is None:
            stop = await self._student_turn()
        return stop

    async def _student_turn(self) -> StopReason | None:
        """One answer of the student, judged and corrected; a reason when the episode is over."""
        if len(self._steps) >= self._settings.limit(self._task):
            return StopReason.MAX_STEPS
        candidate = await self._ask_student()
        if self._teacher is not None and self._settings.before_execution:
            return await self._judged_before(candidate)
        step, answer = await self._execute(candidate)
        if answer is not None and answer.done:
            self._steps.append(step)
            return self._end_of(answer)
        return await self._judged_after(step)

    async def _judged_after(self, step: Step) -> StopReason | None:
        """Judge an executed step; correct it, and the correction too while that one fails."""
        while self._teacher is not None:
            try:
                step = await self._with_verdict(step)
            except BaseException:  # a timeout is a cancellation; in any case the step has happened
                self._steps.append(_unjudged(step))
                raise
            self._steps.append(step)
            if not self._needs_correction(step):
                return self._format_stop()
            if len(self._steps) >= self._settings.limit(self._task):
                return StopReason.MAX_STEPS
            step, answer = await self._execute(self._correction(step.verdict))
            if answer is not None and answer.done:
                self._steps.append(step)
                return self._end_of(answer)
            if answer is not None and not answer.noop:
                self._steps.append(step)
                return None
        self._steps.append(step)
        return self._format_stop()

    async def _judged_before(self, candidate: Step) -> StopReason | None:
        """Judge an unexecuted step; execute it, or keep it as text and execute its correction."""
        judged = await self._with_verdict(candidate)
        if self._needs_correction(judged):
            self._steps.append(judged)
            judged = self._correction(judged.verdict)
        step, answer = await self._execute(judged)
        self._steps.append(step)
        return self._end_of(answer) if answer is not None and answer.done else self._format_stop()

    def _needs_correction(self, step: Step) -> bool:
        faulty = step.verdict is not None and step.verdict.label is not VerdictLabel.GOOD
        return faulty and self._corrections < self._settings.max_corrections

    def _format_stop(self) -> StopReason | None:
        too_many = self._format_errors >= self._settings.max_format_errors
        return StopReason.BAD_FORMAT if too_many else None

    def _end_of(self, answer: EnvStep) -> StopReason:
        self._success = answer.success
        return StopReason.SUCCESS if answer.success else StopReason.ENV_DONE

    async def _ask_student(self) -> Step:
        """The student's next step, not executed; an unreadable answer has an empty action."""
        started = time.monotonic()
        settings = self._settings
        with boundary(LLMError, f"student {self._student.name}"):
            async with asyncio.timeout(settings.step_timeout_s):
                completion = await self._student.complete(
                    conversation(self._prompt, self._steps),
                    max_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    seed=self._seed + len(self._steps),
                    session_id=f"{self._task.task_id}#{self._seed}",
                )
        self.meter.student(completion)
        turn = self._parse(completion.text)
        self._format_errors = 0 if turn else self._format_errors + 1
        return Step(
            index=len(self._steps),
            # an unreadable answer is an error whether or not a teacher says so: never trained
            kind=StepKind.ACT if turn else StepKind.ERROR,
            author=Author.STUDENT,
            text=turn.text if turn else completion.text.strip(),
            thought=turn.thought if turn else "",
            action=turn.action if turn else "",
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            seconds=time.monotonic() - started,
        )

    def _parse(self, text: str) -> Turn | None:
        """The turn to execute; pairs before it, given up by the student, are its errors."""
        if not self._settings.before_execution:
            return parse_turn(text)
        turns = parse_turns(text)
        for turn in (turns or [])[:-1]:
            self._steps.append(
                Step(
                    index=len(self._steps),
                    kind=StepKind.ERROR,
                    author=Author.STUDENT,
                    text=turn.text,
                    thought=turn.thought,
                    action=turn.action,
                )
            )
        return turns[-1] if turns else None

    async def _execute(self, step: Step) -> tuple[Step, EnvStep | None]:
        """Carry the step out; an unreadable one never reaches the environment."""
        step = replace(step, index=len(self._steps))
        if not step.action:
            return replace(step, observation=FORMAT_NOTICE), None
        started = time.monotonic()
        answer = await self._call(self._env.step, step.action)
        self.meter.env_step()
        self._reward += answer.reward
        seconds = step.seconds + time.monotonic() - started
        done = replace(
            step,
            observation=answer.observation,
            reward=answer.reward,
            seconds=seconds,
            noop=answer.noop,
        )
        return done, answer

    async def _with_verdict(self, step: Step) -> Step:
        """The step with the teacher's verdict and the kind that follows from it."""
        assert self._teacher is not None
        started = time.monotonic()
        admissible = await self._call(self._env.admissible_actions)
        view = StepView(
            task=self._task,
            prompt=self._prompt,
            history=tuple(self._steps),
            candidate=step,
            admissible=tuple(admissible),
            show_admissible=self._settings.show_admissible,
            reference=self._reference,
            seed=self._seed,
            meter=self.meter,
        )
        with boundary(TeacherError, f"teacher {self._teacher.name}"):
            verdict = await self._teacher.judge(view)
        kind = KIND_OF_VERDICT[verdict.label]
        if not step.action:
            kind = StepKind.ERROR
        if step.kind is StepKind.CORRECTION and kind is StepKind.ACT:
            kind = StepKind.CORRECTION
        seconds = step.seconds + time.monotonic() - started
        return replace(step, kind=kind, verdict=verdict, seconds=seconds)

    def _correction(self, verdict: Verdict | None) -> Step:
        """The teacher's step: reflection and thought, then the right action."""
        assert verdict is not None
        self._corrections += 1
        self._format_errors = 0
        reflection = verdict.reflection if self._settings.reflection else ""
        return Step(
            index=len(self._steps),
            kind=StepKind.CORRECTION,
            author=Author.TEACHER,
            text=format_correction(reflection, verdict.thought, verdict.action),
            thought=" ".join(part for part in (reflection, verdict.thought) if part),
            action=verdict.action,
            reflection=reflection or None,
        )

    async def _call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a blocking environment call on the executor; foreign errors become EnvError."""
        loop = asyncio.get_running_loop()
        name = getattr(function, "__name__", "call")
        with boundary(EnvError, f"{self._task.env} {name} on {self._task.task_id}"):
            return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def trajectory(
        self, source: Source, stop: StopReason, error: str | None, usage: Usage
    ) -> Trajectory:
        """The record of the episode as it stands."""
        author = Author.EXPERT if source is Source.EXPERT else Author.STUDENT
        steps = tuple(
            replace(s, author=author) if s.author is Author.STUDENT else s for s in self._steps
        )
        models = {author.value: self._student.name}
        if self._teacher is not None:
            models["teacher"] = self._teacher.name
        return Trajectory(
            trajectory_id=trajectory_id(self._task.task_id, source, self._seed),
            task=self._task,
            prompt=self._prompt,
            steps=steps,
            reward=round(self._reward, 6),
            best_reward=best_sum(steps),
            success=self._success,
            stop_reason=stop,
            source=source,
            seed=self._seed,
            error=error,
            models=models,
            prompt_version=self._settings.prompt,
            engine=self._env.engine,
            usage=usage,
            producer=f"step_ray {__version__}",
        )


def _unjudged(step: Step) -> Step:
    """An executed step whose verdict never came; an unreadable answer needs none to be an error."""
    return step if step.kind is StepKind.ERROR else replace(step, kind=StepKind.UNJUDGED)


def trajectory_id(task_id: str, source: Source, seed: int) -> str:
    """`<task_id>#<source>#<seed>`: one per episode of a run, whatever is killed and restarted."""
    return f"{task_id}#{source.value}#{seed}"
