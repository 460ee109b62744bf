"""The episode loop: how episodes end, and what happens around a correction."""

import asyncio
import random
from dataclasses import replace

import pytest

from step_ray.envs.base import EnvStep
from step_ray.errors import BudgetError, ContextLengthError, EnvError, LLMError, TeacherError
from step_ray.llm import Completion, ScriptedLLM
from step_ray.react import format_turn, load_prompt
from step_ray.rollout import FORMAT_NOTICE, EpisodeSettings, run_episode
from step_ray.types import Author, Source, StepKind, StopReason, Task, Verdict, VerdictLabel

TASK = Task(task_id="corridor/1", env="corridor", split="train", goal="reach 2")
GOOD = Verdict(label=VerdictLabel.GOOD)
LEFT = "Thought: Maybe left.\nAction: left"
RIGHT = "Thought: To the right.\nAction: right"
UNREADABLE = "I would rather talk."


class Corridor:
    """Stand at 0, reach 2; `fall` ends badly, `crash` breaks the engine."""

    engine = "corridor/1"

    def reset(self, task):
        if task.params.get("broken"):
            raise FileNotFoundError("no such corridor")
        self.place = 0
        self.actions = []
        return "You are at 0."

    def step(self, action):
        self.actions.append(action)
        if action == "crash":
            raise ValueError("the wall\ncame down")
        if action == "fall":
            return EnvStep(observation="You fell.", reward=0.0, done=True, success=False)
        move = {"left": -1, "right": 1}.get(action, 0)
        self.place += move
        won = self.place == 2
        return EnvStep(
            observation=f"You are at {self.place}." if move else "Nothing happens.",
            reward=1.0 if won else 0.0,
            done=won,
            success=won,
            noop=not move,
        )

    def admissible_actions(self):
        return [f"left from {self.place}", f"right from {self.place}"]

    def close(self):
        pass


class ScriptedTeacher:
    """Gives verdicts (or raises errors) in order, and keeps what it was shown.

    A verdict with completions is what these replies led to.
    """

    name = "scripted-teacher"

    def __init__(self, *script):
        self.script = list(script)
        self.views = []

    async def judge(self, view):
        self.views.append(view)
        answer = self.script[len(self.views) - 1]
        verdict, replies = answer if isinstance(answer, tuple) else (answer, [Completion(text="")])
        for reply in replies:
            view.meter.teacher(reply)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    async def aclose(self):
        pass


class Stuck:
    """Never answers."""

    name = "stuck"

    async def complete(self, messages, **options):
        await asyncio.Event().wait()

    async def judge(self, view):
        await asyncio.Event().wait()

    async def aclose(self):
        pass


def fix(action, label=VerdictLabel.ERROR):
    return Verdict(
        label=label,
        reflection="That was wrong.",
        thought="I mend it.",
        action=action,
        error_type="x",
    )


def play(*script, teacher=None, student=None, task=TASK, env=None, source=None, **settings):
    settings = {"prompt": "alfworld_short"} | settings
    source = source or (Source.SELF_REFLECTED if teacher else Source.STUDENT)
    return asyncio.run(
        run_episode(
            task,
            env or Corridor(),
            student or ScriptedLLM(script, name="student-1"),
            settings=EpisodeSettings(**settings),
            source=source,
            teacher=teacher,
            seed=3,
        )
    )


def kinds(trajectory):
    return [(step.kind.value, step.action) for step in trajectory.steps]


def observations(trajectory):
    return [step.observation for step in trajectory.steps]


def shown(call):
    return [(message.role, message.content) for message in call]


# How an episode ends


def test_success_ends_the_episode_with_its_reward():
    got = play(RIGHT, RIGHT)
    assert (got.stop_reason, got.success, got.reward, got.error) == (
        StopReason.SUCCESS,
        True,
        1.0,
        None,
    )
    assert [step.reward for step in got.steps] == [0.0, 1.0]
    assert observations(got) == ["You are at 1.", "You are at 2."]
    assert [step.index for step in got.steps] == [0, 1]


def test_the_record_says_who_played_what_how():
    got = play(RIGHT, RIGHT)
    assert got.trajectory_id == "corridor/1#student#3"
    assert (got.task, got.seed, got.source) == (TASK, 3, Source.STUDENT)
    assert (got.models, got.engine) == ({"student": "student-1"}, "corridor/1")
    assert got.prompt_version == "alfworld_short"
    assert got.producer.startswith("step_ray ")
    assert shown(got.prompt) == [
        ("system", load_prompt("alfworld_short")),
        ("user", "You are at 0."),
    ]


def test_an_expert_episode_is_written_by_the_expert():
    got = play(RIGHT, RIGHT, source=Source.EXPERT)
    assert [step.author for step in got.steps] == [Author.EXPERT, Author.EXPERT]
    assert got.models == {"expert": "student-1"}


def test_an_end_without_success_is_env_done():
    got = play("Action: fall")
    assert (got.stop_reason, got.success, got.reward) == (StopReason.ENV_DONE, False, 0.0)
    assert observations(got) == ["You fell."]


def test_max_steps_ends_the_episode():
    got = play(LEFT, LEFT, max_steps=2)
    assert (got.stop_reason, len(got.steps)) == (StopReason.MAX_STEPS, 2)
    assert got.usage.student_calls == 2


def test_a_full_context_ends_the_episode_and_keeps_its_steps():
    got = play(RIGHT, ContextLengthError("too long"))
    assert (got.stop_reason, got.error) == (StopReason.CONTEXT_LENGTH, "too long")
    assert kinds(got) == [("act", "right")]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LLMError("gave up"), "gave up"),
        (KeyError("choices"), "student student-1: KeyError: 'choices'"),
    ],
)
def test_a_failing_student_model_is_llm_error(error, line):
    got = play(RIGHT, error)
    assert (got.stop_reason, got.error, len(got.steps)) == (StopReason.LLM_ERROR, line, 1)


def test_a_student_that_does_not_answer_in_time_is_llm_error():
    got = play(student=Stuck(), step_timeout_s=0.01)
    assert got.stop_reason is StopReason.LLM_ERROR
    assert got.error.startswith("student stuck: TimeoutError")


def test_a_broken_reset_is_env_error():
    got = play(RIGHT, task=replace(TASK, params={"broken": "yes"}))
    assert got.stop_reason is StopReason.ENV_ERROR
    assert got.error == "corridor reset on corridor/1: FileNotFoundError: no such corridor"
    assert (got.prompt, got.steps) == ((), ())


def test_a_broken_step_is_env_error_and_one_line():
    got = play(RIGHT, "Action: crash")
    assert got.stop_reason is StopReason.ENV_ERROR
    assert got.error == "corridor step on corridor/1: ValueError: the wall"
    assert kinds(got) == [("act", "right")]


def test_the_environments_own_error_keeps_its_words():
    class Gone(Corridor):
        def reset(self, task):
            raise EnvError("the game file is missing")

    got = play(RIGHT, env=Gone())
    assert (got.stop_reason, got.error) == (StopReason.ENV_ERROR, "the game file is missing")


@pytest.mark.parametrize(
    ("error", "stop", "line"),
    [
        (TeacherError("no verdict"), StopReason.TEACHER_ERROR, "no verdict"),
        (BudgetError("3 calls are spent"), StopReason.BUDGET, "3 calls are spent"),
        (
            KeyError("verdict"),
            StopReason.TEACHER_ERROR,
            "teacher scripted-teacher: KeyError: 'verdict'",
        ),
    ],
)
def test_a_failing_teacher_ends_the_episode(error, stop, line):
    got = play(RIGHT, LEFT, teacher=ScriptedTeacher(GOOD, error))
    assert (got.stop_reason, got.error) == (stop, line)
    assert kinds(got) == [("act", "right"), ("unjudged", "left")]
    assert observations(got) == ["You are at 1.", "You are at 0."]
    assert [step.index for step in got.steps] == [0, 1]


def test_an_unjudged_answer_that_could_not_be_read_is_still_an_error():
    got = play(UNREADABLE, teacher=ScriptedTeacher(TeacherError("no verdict")))
    assert kinds(got) == [("error", "")]


def test_a_correction_that_does_nothing_and_is_not_judged_is_no_correction():
    got = play(LEFT, teacher=ScriptedTeacher(fix("jump"), TeacherError("no verdict")))
    assert kinds(got) == [("error", "left"), ("unjudged", "jump")]
    assert [step.author for step in got.steps] == [Author.STUDENT, Author.TEACHER]


def test_before_execution_a_step_without_a_verdict_never_happened():
    got = play(LEFT, teacher=ScriptedTeacher(TeacherError("no verdict")), before_execution=True)
    assert (got.stop_reason, got.steps) == (StopReason.TEACHER_ERROR, ())


def test_the_winning_step_needs_no_verdict():
    teacher = ScriptedTeacher(GOOD)
    got = play(RIGHT, RIGHT, teacher=teacher)
    assert (got.stop_reason, got.steps[-1].verdict) == (StopReason.SUCCESS, None)
    assert got.usage.teacher_calls == 1


def test_an_episode_that_takes_too_long_is_timeout():
    got = play(RIGHT, teacher=Stuck(), episode_timeout_s=0.5)
    assert (got.stop_reason, got.error) == (StopReason.TIMEOUT, "no end within 0.5 s")
    assert kinds(got) == [("unjudged", "right")]


def test_what_a_judgement_cost_is_counted_when_it_fails():
    paid = [Completion(text="", prompt_tokens=30, cost=0.5)] * 2
    got = play(RIGHT, teacher=ScriptedTeacher((TeacherError("no verdict"), paid)))
    assert got.stop_reason is StopReason.TEACHER_ERROR
    usage = got.usage
    assert (usage.teacher_calls, usage.teacher_prompt_tokens, usage.teacher_cost) == (2, 60, 1.0)


def test_cancelling_the_episode_is_not_swallowed():
    async def cancelled():
        episode = run_episode(
            TASK,
            Corridor(),
            Stuck(),
            settings=EpisodeSettings(prompt="alfworld_short"),
            source=Source.STUDENT,
        )
        running = asyncio.create_task(episode)
        await asyncio.sleep(0)
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


# Unreadable answers


def test_unreadable_answers_in_a_row_end_the_episode():
    env = Corridor()
    got = play(UNREADABLE, UNREADABLE, env=env, max_format_errors=2)
    assert got.stop_reason is StopReason.BAD_FORMAT
    assert observations(got) == [FORMAT_NOTICE, FORMAT_NOTICE]
    assert kinds(got) == [("error", ""), ("error", "")]
    assert env.actions == []
    assert got.usage.env_steps == 0


def test_a_readable_answer_starts_the_count_of_unreadable_ones_again():
    got = play(UNREADABLE, RIGHT, UNREADABLE, RIGHT, max_format_errors=2)
    assert got.stop_reason is StopReason.SUCCESS
    assert kinds(got) == [("error", ""), ("act", "right"), ("error", ""), ("act", "right")]


def test_the_student_reads_its_unreadable_answer_and_the_notice():
    student = ScriptedLLM([f"  {UNREADABLE}\n", RIGHT, RIGHT])
    play(student=student)
    assert shown(student.calls[1])[2:] == [("assistant", UNREADABLE), ("user", FORMAT_NOTICE)]


def test_a_teacher_corrects_an_unreadable_answer():
    teacher = ScriptedTeacher(fix("right"))
    got = play(UNREADABLE, RIGHT, teacher=teacher, max_format_errors=1)
    assert got.stop_reason is StopReason.SUCCESS
    assert kinds(got) == [("error", ""), ("correction", "right"), ("act", "right")]
    assert (teacher.views[0].candidate.action, teacher.views[0].candidate.observation) == (
        "",
        FORMAT_NOTICE,
    )


def test_an_unreadable_answer_that_the_teacher_calls_good_is_still_an_error():
    got = play(UNREADABLE, RIGHT, RIGHT, teacher=ScriptedTeacher(GOOD, GOOD))
    assert kinds(got)[0] == ("error", "")


# Corrections after execution


def test_a_correction_goes_on_from_the_state_that_the_error_left():
    got = play(LEFT, RIGHT, RIGHT, teacher=ScriptedTeacher(fix("right"), GOOD))
    assert kinds(got) == [
        ("error", "left"),
        ("correction", "right"),
        ("act", "right"),
        ("act", "right"),
    ]
    assert observations(got) == [
        "You are at -1.",
        "You are at 0.",
        "You are at 1.",
        "You are at 2.",
    ]
    assert (got.stop_reason, got.source) == (StopReason.SUCCESS, Source.SELF_REFLECTED)


def test_the_correction_is_the_teachers_and_carries_the_reflection():
    got = play(LEFT, RIGHT, RIGHT, teacher=ScriptedTeacher(fix("right"), GOOD))
    error, correction = got.steps[:2]
    assert (error.author, error.text, error.verdict) == (Author.STUDENT, LEFT, fix("right"))
    assert (correction.author, correction.reflection) == (Author.TEACHER, "That was wrong.")
    assert correction.text == "Thought: That was wrong. I mend it.\nAction: right"
    assert (correction.thought, correction.action) == ("That was wrong. I mend it.", "right")
    assert got.models == {"student": "student-1", "teacher": "scripted-teacher"}


def test_the_student_sees_its_error_the_correction_and_both_observations():
    student = ScriptedLLM([LEFT, RIGHT, RIGHT])
    play(student=student, teacher=ScriptedTeacher(fix("right"), GOOD))
    assert shown(student.calls[1]) == [
        ("system", load_prompt("alfworld_short")),
        ("user", "You are at 0."),
        ("assistant", LEFT),
        ("user", "You are at -1."),
        ("assistant", "Thought: That was wrong. I mend it.\nAction: right"),
        ("user", "You are at 0."),
    ]


def test_the_teacher_sees_the_history_the_step_and_what_is_possible_now():
    teacher = ScriptedTeacher(GOOD, fix("right"))
    play(RIGHT, LEFT, RIGHT, RIGHT, teacher=teacher, max_steps=3)
    view = teacher.views[1]
    assert [step.action for step in view.history] == ["right"]
    assert (view.candidate.action, view.candidate.observation) == ("left", "You are at 0.")
    assert view.admissible == ("left from 0", "right from 0")
    assert (view.task, view.seed, view.first_observation) == (TASK, 3, "You are at 0.")


def test_the_teacher_is_not_shown_valid_actions_when_told_so():
    teacher = ScriptedTeacher(GOOD)
    play(RIGHT, RIGHT, teacher=teacher, show_admissible=False)
    assert not teacher.views[0].show_admissible
    assert teacher.views[0].admissible  # its own action is checked all the same


def test_a_correction_that_wins_ends_the_episode():
    got = play(RIGHT, "Action: wait", teacher=ScriptedTeacher(GOOD, fix("right")))
    assert got.stop_reason is StopReason.SUCCESS
    assert kinds(got)[-1] == ("correction", "right")


def test_a_suboptimal_step_is_marked_and_corrected():
    verdict = fix("right", VerdictLabel.SUBOPTIMAL)
    got = play(LEFT, RIGHT, RIGHT, teacher=ScriptedTeacher(verdict, GOOD))
    assert kinds(got)[:2] == [("suboptimal", "left"), ("correction", "right")]


def test_a_correction_that_does_nothing_is_judged_and_corrected_again():
    teacher = ScriptedTeacher(fix("jump"), fix("right"), GOOD)
    got = play(LEFT, RIGHT, RIGHT, teacher=teacher)
    assert kinds(got)[:3] == [("error", "left"), ("error", "jump"), ("correction", "right")]
    assert [step.author for step in got.steps[:3]] == [
        Author.STUDENT,
        Author.TEACHER,
        Author.TEACHER,
    ]
    assert teacher.views[1].candidate.kind is StepKind.CORRECTION


def test_a_correction_that_works_is_not_judged():
    teacher = ScriptedTeacher(fix("right"), GOOD)
    play(LEFT, RIGHT, RIGHT, teacher=teacher)
    assert [view.candidate.action for view in teacher.views] == ["left", "right"]
    assert teacher.views[1].candidate.author is Author.STUDENT


def test_errors_beyond_max_corrections_are_marked_but_not_corrected():
    teacher = ScriptedTeacher(fix("right"), fix("right"), GOOD, GOOD)
    got = play(LEFT, LEFT, RIGHT, RIGHT, RIGHT, teacher=teacher, max_corrections=1)
    assert kinds(got) == [
        ("error", "left"),
        ("correction", "right"),
        ("error", "left"),
        ("act", "right"),
        ("act", "right"),
        ("act", "right"),
    ]
    assert got.steps[2].verdict == fix("right")
    assert got.stop_reason is StopReason.SUCCESS


def test_a_failed_correction_counts_as_one():
    teacher = ScriptedTeacher(fix("jump"), fix("right"))
    got = play(LEFT, teacher=teacher, max_corrections=1, max_steps=2)
    assert kinds(got) == [("error", "left"), ("error", "jump")]


def test_no_correction_is_made_beyond_max_steps():
    got = play(RIGHT, LEFT, teacher=ScriptedTeacher(GOOD, fix("right")), max_steps=2)
    assert kinds(got) == [("act", "right"), ("error", "left")]
    assert got.stop_reason is StopReason.MAX_STEPS


def test_without_reflection_the_correction_is_thought_and_action():
    got = play(LEFT, RIGHT, RIGHT, teacher=ScriptedTeacher(fix("right"), GOOD), reflection=False)
    correction = got.steps[1]
    assert correction.text == "Thought: I mend it.\nAction: right"
    assert correction.reflection is None
    assert got.steps[0].verdict.reflection == "That was wrong."


# Corrections before execution


def test_before_execution_the_error_is_never_executed():
    env = Corridor()
    teacher = ScriptedTeacher(fix("right"), GOOD)
    got = play(LEFT, RIGHT, teacher=teacher, env=env, before_execution=True)
    assert env.actions == ["right", "right"]
    assert kinds(got) == [("error", "left"), ("correction", "right"), ("act", "right")]
    assert observations(got) == [None, "You are at 1.", "You are at 2."]
    assert [view.candidate.observation for view in teacher.views] == [None, None]
    assert got.stop_reason is StopReason.SUCCESS


def test_before_execution_the_error_shares_the_turn_of_its_correction():
    student = ScriptedLLM([LEFT, RIGHT])
    play(student=student, teacher=ScriptedTeacher(fix("right"), GOOD), before_execution=True)
    assert shown(student.calls[1])[2:] == [
        ("assistant", f"{LEFT}\nThought: That was wrong. I mend it.\nAction: right"),
        ("user", "You are at 1."),
    ]


def test_before_execution_a_step_that_is_not_corrected_is_executed():
    got = play(
        LEFT,
        LEFT,
        teacher=ScriptedTeacher(fix("right"), fix("right")),
        before_execution=True,
        max_corrections=1,
        max_steps=3,
    )
    assert kinds(got) == [("error", "left"), ("correction", "right"), ("error", "left")]
    assert observations(got) == [None, "You are at 1.", "You are at 0."]


def test_a_student_may_mend_itself_in_one_turn():
    env = Corridor()
    mended = f"{LEFT}\nThought: No, right.\nAction: right"
    got = play(mended, mended, env=env, before_execution=True)
    assert env.actions == ["right", "right"]
    assert kinds(got) == [("error", "left"), ("act", "right")] * 2
    assert [step.index for step in got.steps] == [0, 1, 2, 3]


def test_mending_itself_is_unreadable_where_steps_are_judged_after_execution():
    got = play(f"{LEFT}\n{RIGHT}", max_format_errors=1)
    assert got.stop_reason is StopReason.BAD_FORMAT


# Counts, seeds, threads


def test_usage_counts_every_call_token_and_retry():
    class Student(ScriptedLLM):
        async def complete(self, messages, **options):
            answer = await super().complete(messages, **options)
            return replace(answer, prompt_tokens=10 * len(self.calls), retries=1, cost=2.0)

    replies = [
        Completion(text="", prompt_tokens=60, completion_tokens=5, retries=3, cost=0.5),
        Completion(text="", prompt_tokens=40, completion_tokens=2, cost=0.25, unstructured=True),
    ]
    free = Completion(text="", cached=True)
    teacher = ScriptedTeacher((fix("right"), replies), (GOOD, [free]))
    got = play(student=Student([LEFT, RIGHT, RIGHT]), teacher=teacher)
    usage = got.usage
    assert (usage.env_steps, usage.student_calls) == (4, 3)
    assert (usage.teacher_calls, usage.teacher_cached_calls) == (2, 1)
    assert (usage.prompt_tokens, usage.completion_tokens) == (10 + 20 + 30, 5 + 6 + 6)
    assert (usage.teacher_prompt_tokens, usage.teacher_completion_tokens) == (100, 7)
    assert (usage.retries, usage.teacher_unstructured_calls) == (6, 1)
    assert (usage.student_cost, usage.teacher_cost) == (6.0, 0.75)
    assert [(step.prompt_tokens, step.completion_tokens) for step in got.steps] == [
        (10, 5),
        (0, 0),
        (20, 6),
        (30, 6),
    ]


class Dice:
    """A student that samples: its answer depends on the seed of the call alone."""

    name = "dice"

    def __init__(self):
        self.requests = []

    async def complete(self, messages, **options):
        self.requests.append(options)
        choice = random.Random(f"{options['session_id']}/{options['seed']}")
        return Completion(text=format_turn("", choice.choice(("left", "right", "wait"))))

    async def aclose(self):
        pass


def dice_game(seed):
    trajectory = asyncio.run(
        run_episode(
            TASK,
            Corridor(),
            Dice(),
            settings=EpisodeSettings(prompt="alfworld_short", max_steps=30),
            source=Source.STUDENT,
            seed=seed,
        )
    )
    steps = tuple(replace(step, seconds=0.0) for step in trajectory.steps)
    return replace(trajectory, steps=steps, usage=replace(trajectory.usage, seconds=0.0))


def test_the_same_seed_plays_the_same_episode_and_another_one_another():
    assert dice_game(1) == dice_game(1)
    assert dice_game(1).steps != dice_game(2).steps


def test_the_limits_of_sampling_reach_the_student():
    student = Dice()
    play(student=student, max_steps=2, max_new_tokens=17, temperature=0.5)
    assert student.requests == [
        {"max_tokens": 17, "temperature": 0.5, "seed": seed, "session_id": "corridor/1#3"}
        for seed in (3, 4)
    ]
