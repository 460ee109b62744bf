"""ReAct text: reading and writing a turn, and the messages of an episode."""

import pytest
from builders import PROMPT, make_step, make_trajectory
from hypothesis import given
from hypothesis import strategies as st

from step_ray.errors import ConfigError
from step_ray.react import (
    Turn,
    conversation,
    format_correction,
    format_turn,
    initial_messages,
    load_prompt,
    parse_turn,
    parse_turns,
    trajectory_messages,
)


def shown(messages):
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize(
    ("text", "thought", "action"),
    [
        ("Thought: I go.\nAction: go to desk 1", "I go.", "go to desk 1"),
        ("Action: look", "", "look"),
        ("  Thought:  spaced \n\n Action:  look  \n", "spaced", "look"),
        ("Thought: one\ntwo\n\nthree\nAction: look", "one\ntwo\n\nthree", "look"),
        ("Thought:\nAction: look", "", "look"),
        (
            "Thought: The word Action: is inside.\nAction: look",
            "The word Action: is inside.",
            "look",
        ),
    ],
)
def test_a_thought_and_an_action_are_read(text, thought, action):
    assert parse_turn(text) == Turn(thought=thought, action=action)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "go to desk 1",
        "Thought: I go.",
        "Thought: I go.\nAction:",
        "Thought: \nAction: ",
        "Thought: I go.\nAction: look\nMore text",
        "Action: look\nAction: go",
        "Thought: a\nAction: look\nAction: go",
        "Thought: a\n   Action: look\nAction: go",
        "Thought: a\nAction: look\nThought: b\nAction: go",
        "Action: look\nObservation: a desk 1\nAction: go",
        "Well.\nAction: look",
        "action: look",
    ],
)
def test_anything_but_one_thought_and_one_action_is_refused(text):
    assert parse_turn(text) is None


line = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1)
action = line.map(str.strip).filter(bool)
thought = (
    st.lists(line, max_size=3)
    .map("\n".join)
    .map(str.strip)
    .filter(lambda text: not any(part.strip().startswith("Action:") for part in text.split("\n")))
)


@given(thought, action)
def test_what_is_written_is_read_back(thought, action):
    text = format_turn(thought, action)
    turn = parse_turn(text)
    assert turn == Turn(thought=thought, action=action)
    assert turn.text == text


@given(st.text())
def test_any_text_is_a_turn_with_one_line_of_action_or_refused(text):
    turn = parse_turn(text)
    assert turn is None or (turn.action and "\n" not in turn.action)


@given(st.text())
def test_reading_is_stable(text):
    turn = parse_turn("Thought: " + text + "\nAction: look")
    assert turn is None or parse_turn(turn.text) == turn


def test_a_turn_without_thought_has_no_thought_line():
    assert format_turn("", "look") == "Action: look"


def test_a_correction_puts_the_reflection_before_the_thought():
    assert format_correction("I was wrong.", "I go.", "go to desk 1") == (
        "Thought: I was wrong. I go.\nAction: go to desk 1"
    )
    assert format_correction("", "I go.", "look") == "Thought: I go.\nAction: look"
    assert format_correction("", "", "look") == "Action: look"


def test_a_self_mended_answer_is_read_pair_by_pair():
    text = "Thought: a\nAction: take\nThought: No.\nI look.\nAction: look\n"
    assert parse_turns(text) == [
        Turn(thought="a", action="take"),
        Turn(thought="No.\nI look.", action="look"),
    ]


@pytest.mark.parametrize("text", ["", "  ", "look", "Thought: a\nThought: b\nAction: look"])
def test_a_self_mended_answer_with_an_unreadable_part_is_refused(text):
    assert parse_turns(text) is None


def test_executed_steps_alternate_with_their_observations():
    steps = [make_step("Action: a", "saw a"), make_step("Action: b", "saw b")]
    assert shown(conversation(PROMPT, steps)) == [
        ("system", "rules"),
        ("user", "room"),
        ("assistant", "Action: a"),
        ("user", "saw a"),
        ("assistant", "Action: b"),
        ("user", "saw b"),
    ]


def test_unexecuted_steps_share_the_message_of_the_next_executed_one():
    steps = [
        make_step("Action: a", None),
        make_step("Action: b", None),
        make_step("Action: c", "saw c"),
    ]
    assert shown(conversation(PROMPT, steps))[2:] == [
        ("assistant", "Action: a\nAction: b\nAction: c"),
        ("user", "saw c"),
    ]


def test_a_last_unexecuted_step_is_a_message_of_its_own():
    steps = [make_step("Action: a", "saw a"), make_step("Action: b", None)]
    assert shown(conversation(PROMPT, steps))[-1] == ("assistant", "Action: b")


def test_an_empty_observation_is_still_a_message():
    assert shown(conversation(PROMPT, [make_step("Action: a", "")]))[-1] == ("user", "")


def test_a_trajectory_ends_with_the_agents_turn():
    def messages(*steps):
        return shown(trajectory_messages(make_trajectory(*steps)))

    assert messages(make_step("Action: a", "saw a"))[-1] == ("assistant", "Action: a")
    assert messages(make_step("Action: a", None))[-1] == ("assistant", "Action: a")
    assert messages() == [("system", "rules"), ("user", "room")]


def test_the_first_messages_are_the_instruction_and_the_first_observation():
    messages = initial_messages("alfworld_v1", "You see a desk 1.")
    assert [message.role for message in messages] == ["system", "user"]
    assert messages[0].content == load_prompt("alfworld_v1")
    assert "Thought: <your reasoning>\nAction: <one action>" in messages[0].content
    assert messages[1].content == "You see a desk 1."


def test_an_unknown_prompt_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"^prompt: 'v9' is not a known .*'alfworld_v1'"):
        load_prompt("v9")
