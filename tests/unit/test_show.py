"""The terminal view shows every part of an episode and no control characters."""

from io import StringIO

from builders import make_step, make_task, make_trajectory
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from step_ray.tools.show import show_trajectory, visible
from step_ray.types import Message, StepKind, StopReason, Trajectory, Verdict, VerdictLabel


def episode(observation: str = "Nothing happens.") -> Trajectory:
    error = make_step(
        "Thought: Mugs [red]are[/red] here.\nAction: take mug 1",
        observation,
        StepKind.ERROR,
        verdict=Verdict(label=VerdictLabel.ERROR, error_type="no_op"),
    )
    correction = make_step(
        "Thought: No mug here. Go on.\nAction: go to shelf 1",
        None,
        StepKind.CORRECTION,
        index=1,
        reflection="No mug here.",
    )
    return make_trajectory(
        error,
        correction,
        name="alfworld/train/g1#self_reflected#0",
        task=make_task("g1", goal="find a mug"),
        prompt=(Message(role="system", content="Act in the house."),),
        reward=0.0,
        success=False,
        stop_reason=StopReason.LLM_ERROR,
        error="student base: no answer",
        models={"student": "base"},
    )


def shown(trajectory: Trajectory, styles: bool = False) -> str:
    console = Console(file=StringIO(), width=200, record=True, force_terminal=True)
    show_trajectory(trajectory, console)
    return console.export_text(styles=styles)


def test_every_part_of_the_episode_is_shown_in_order():
    text = shown(episode())
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
    assert "Mugs [red]are[/red] here." in shown(episode())


def test_reflection_has_its_own_colour():
    assert "\x1b[33mNo mug here.\x1b[0m" in shown(episode(), styles=True)


def test_escape_sequence_in_an_observation_is_written_out():
    text = shown(episode(observation="\x1b]0;owned\x07 ok"))
    assert "\x1b" not in text and "\x07" not in text
    assert r"> \x1b]0;owned\x07 ok" in text


def test_newlines_and_printable_text_stay():
    assert visible("Küche\n\t好") == "Küche\n\t好"


@given(st.text())
def test_nothing_unprintable_is_left(text):
    assert all(char.isprintable() or char in "\n\t" for char in visible(text))
