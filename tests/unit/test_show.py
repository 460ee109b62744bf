"""The terminal view shows every part of an episode and no control characters."""

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from step_ray.show import show_trajectory, visible
from step_ray.types import (
    Author,
    Message,
    Source,
    Step,
    StepKind,
    StopReason,
    Task,
    Trajectory,
    Verdict,
    VerdictLabel,
)


def make_trajectory(observation: str = "Nothing happens.") -> Trajectory:
    steps = (
        Step(
            index=0,
            kind=StepKind.ERROR,
            author=Author.STUDENT,
            text="Thought: Mugs [red]are[/red] here.\nAction: take mug 1",
            thought="",
            action="take mug 1",
            observation=observation,
            verdict=Verdict(label=VerdictLabel.ERROR, error_type="no_op"),
        ),
        Step(
            index=1,
            kind=StepKind.CORRECTION,
            author=Author.TEACHER,
            text="Thought: No mug here. Go on.\nAction: go to shelf 1",
            thought="Go on.",
            action="go to shelf 1",
            reflection="No mug here.",
        ),
    )
    return Trajectory(
        trajectory_id="alfworld/train/g1#self_reflected#0",
        task=Task(task_id="g1", env="alfworld", split="train", goal="find a mug"),
        prompt=(Message(role="system", content="Act in the house."),),
        steps=steps,
        reward=0.0,
        success=False,
        stop_reason=StopReason.LLM_ERROR,
        source=Source.SELF_REFLECTED,
        seed=0,
        error="student base: no answer",
        models={"student": "base"},
    )


def shown(trajectory: Trajectory, styles: bool = False) -> str:
    console = Console(file=StringIO(), width=200, record=True, force_terminal=True)
    show_trajectory(trajectory, console)
    return console.export_text(styles=styles)


def test_every_part_of_the_episode_is_shown_in_order():
    text = shown(make_trajectory())
    parts = [
        "alfworld/train/g1#self_reflected#0",
        "find a mug, student base",
        "Act in the house.",
        "0 error by student",
        "Action: take mug 1",
        "> Nothing happens.",
        "teacher: error (no_op)",
        "1 correction by teacher",
        "Thought: No mug here. Go on.",
        "> (not executed)",
        "not solved, llm_error, reward 0, 2 steps",
        "student base: no answer",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


def test_markup_in_a_step_is_text():
    assert "Mugs [red]are[/red] here." in shown(make_trajectory())


def test_reflection_has_its_own_colour():
    assert "\x1b[33mNo mug here.\x1b[0m" in shown(make_trajectory(), styles=True)


def test_escape_sequence_in_an_observation_is_written_out():
    text = shown(make_trajectory(observation="\x1b]0;owned\x07 ok"))
    assert "\x1b" not in text and "\x07" not in text
    assert r"> \x1b]0;owned\x07 ok" in text


def test_newlines_and_printable_text_stay():
    assert visible("Küche\n\t好") == "Küche\n\t好"


@given(st.text())
def test_nothing_unprintable_is_left(text):
    assert all(char.isprintable() or char in "\n\t" for char in visible(text))
