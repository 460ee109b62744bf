"""The agent's own routes over a backend that repeats what it is asked."""

import json

import pytest
from api_script import ACT, EPISODES, call

from step_ray.react import read_step, split_thought

TURN = "Thought: That did nothing. I look elsewhere.\nAction: go to desk 1"
PLAY = {"environment": "alfworld", "split": "valid_seen", "count": 2}


def lines(answer):
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_step_has_its_parts_its_tokens_and_its_usage():
    body = call("POST", ACT, json={"task": TURN}).json()
    body.pop("id"), body.pop("created")
    usage = body.pop("usage")
    assert body == {
        "object": "agent.act",
        "model": "echo",
        "text": TURN,
        "reflection": "That did nothing.",
        "thought": "I look elsewhere.",
        "action": "go to desk 1",
        "given_up": [],
        "finish_reason": "stop",
        "token_ids": [5, 6],
    }
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2)


def test_an_unreadable_answer_has_no_action():
    body = call("POST", ACT, json={"task": " I do not know. "}).json()
    assert (body["action"], body["thought"], body["text"]) == ("", "", "I do not know.")


def test_an_agent_that_mends_itself_gives_up_actions_only_where_it_was_trained_to():
    text = "Thought: a.\nAction: x\nThought: No. b.\nAction: y"
    step = read_step(text, before_execution=True)
    assert (step["given_up"], step["reflection"], step["action"]) == (["x"], "No.", "y")
    assert step["text"] == text
    assert read_step(text, before_execution=False)["action"] == ""


@pytest.mark.parametrize(
    ("thought", "parts"),
    [
        ("", ("", "")),
        ("I look.", ("", "I look.")),
        ("No! Why? I look.", ("No! Why?", "I look.")),
        ("I go to desk 1.5 m away", ("", "I go to desk 1.5 m away")),
    ],
)
def test_the_last_sentence_is_the_thought_and_what_stands_before_the_reflection(thought, parts):
    assert split_thought(thought) == parts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"task": ""}, "task"),
        ({"history": [{"observation": "x"}]}, "history.0"),
        ({"history": [{"text": "a", "action": "b", "observation": "x"}]}, "history.0"),
        ({"history": [{"text": "a", "thought": "b", "observation": "x"}]}, "history.0"),
        ({"history": [{"action": "a"}]}, "history.0.observation"),
        ({"prompt": "../secret"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": "x"}, "stop"),
    ],
)
def test_a_bad_step_request_is_400_and_named(fields, param):
    answer = call("POST", ACT, json={"task": "t", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_an_unknown_model_is_404():
    for path, body in ((ACT, {"task": "t"}), (EPISODES, PLAY)):
        assert call("POST", path, json={**body, "model": "other"}).status_code == 404


@pytest.mark.parametrize("text", ["too long", "odd", "crash", "late crash", "too slow"])
def test_errors_of_a_step_have_openai_form(text):
    answer = call("POST", ACT, json={"task": text})
    assert answer.status_code in (400, 500, 504)
    assert answer.json()["error"]["message"]
    assert "secret" not in answer.text


def test_episodes_come_as_lines_and_infinity_as_null():
    first, second, report = lines(call("POST", EPISODES, json=PLAY))
    assert first == {"object": "episode", "number": 1, "reward": None}
    assert (second["number"], report["object"]) == (2, "episodes.report")


def test_episodes_come_as_events_where_asked_for():
    answer = call("POST", EPISODES, json={**PLAY, "format": "sse"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert [json.loads(e.removeprefix("data: "))["object"] for e in events] == [
        "episode",
        "episode",
        "episodes.report",
    ]


def test_episodes_that_fail_on_the_way_end_with_the_error():
    *_, last = lines(call("POST", EPISODES, json={**PLAY, "environment": "late"}))
    assert last["error"]["message"] == "internal error: RuntimeError"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"count": None}, None),
        ({"ids": ["a"]}, None),
        ({"count": None, "ids": []}, "ids"),
        ({"count": None, "ids": ["a", "a"]}, None),
        ({"count": 0}, "count"),
        ({"seed": -1}, "seed"),
        ({"split": "../../etc"}, "split"),
        ({"environment": "a/b"}, "environment"),
        ({"max_steps": 0}, "max_steps"),
        ({"format": "csv"}, "format"),
    ],
)
def test_a_bad_episodes_request_is_400_and_named(fields, param):
    answer = call("POST", EPISODES, json={**PLAY, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
