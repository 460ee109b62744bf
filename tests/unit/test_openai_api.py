"""OpenAI's routes over a backend that repeats what it is asked, without model and Ray."""

import json

import pytest
from api_script import ASK, CHAT, COMPLETIONS, call

from step_ray.serving.api.schemas import ChatRequest, CompletionRequest


def say(text, *, role="user"):
    return {"role": role, "content": text}


def ask(text, **fields):
    return {**ASK, "messages": [say(text)], **fields}


def events(answer):
    """The objects of a stream, without the end mark that must be there."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, end = answer.text.strip().split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in found]


def test_a_chat_is_answered_with_its_usage():
    body = call("POST", CHAT, json=ASK).json()
    assert body["choices"][0]["message"]["content"] == "go"
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = [body["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert usage == [3, 2, 5]
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "go "}, {"type": "text", "text": "on"}]
    answer = call("POST", CHAT, json=ask(parts))
    assert answer.json()["choices"][0]["message"]["content"] == "go on"


def test_a_chat_streams_role_pieces_reason_usage_and_end():
    body = ask("one", stream=True, stream_options={"include_usage": True})
    role, *pieces, reason, usage = events(call("POST", CHAT, json=body))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [p["choices"][0]["delta"] for p in pieces] == [{"content": c} for c in "one"]
    assert reason["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)
    assert len({event["id"] for event in (role, *pieces, reason, usage)}) == 1


def test_a_stream_tells_its_usage_only_where_it_is_asked_for():
    assert not any(
        "usage" in event for event in events(call("POST", CHAT, json=ask("a", stream=True)))
    )


def test_a_completion_has_one_choice_per_prompt_and_one_usage():
    body = call("POST", COMPLETIONS, json={"model": "echo", "prompt": ["a", "b"]}).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "b")]
    assert (body["object"], body["usage"]["total_tokens"]) == ("text_completion", 10)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], [[]]),
        ("", [""]),
    ],
)
def test_prompts_come_as_text_or_ids_one_or_several(prompt, prompts):
    assert CompletionRequest(model="echo", prompt=prompt).prompts == prompts


def test_a_completion_streams_each_choice_under_its_number():
    body = {"model": "echo", "prompt": ["ab", "xyz"], "stream": True}
    body["stream_options"] = {"include_usage": True}
    *parts, usage = events(call("POST", COMPLETIONS, json=body))
    texts, reasons = ["", ""], [None, None]
    for (choice,) in (part["choices"] for part in parts):
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert (texts, reasons) == (["ab", "xyz"], ["stop", "stop"])
    assert usage["usage"]["total_tokens"] == 10


def test_the_bodies_of_vllms_load_tool_are_taken():
    both = {"model": "echo", "temperature": 0.0, "ignore_eos": True, "stream": True}
    both["stream_options"] = {"include_usage": True}
    text = {"prompt": "go", "max_tokens": 9, "repetition_penalty": 1.0, "logprobs": None}
    chat = {"max_completion_tokens": 9}
    chat["messages"] = [{"role": "user", "content": [{"type": "text", "text": "go"}]}]
    for path, body in ((COMPLETIONS, text), (CHAT, chat)):
        assert call("POST", path, json={**both, **body}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False},
        {"response_format": {"type": "text"}, "user": "me", "metadata": {"run": "1"}},
        {"max_tokens": None, "temperature": None, "top_p": None, "stop": None, "stream": None},
        {"max_completion_tokens": 4, "temperature": 0, "top_p": 1, "seed": 3, "stop": ["a", "b"]},
    ],
)
def test_fields_that_change_nothing_or_are_supported_pass(fields):
    assert call("POST", CHAT, json={**ASK, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": []}, "tools"),
        ({"top_k": 5}, "top_k"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, None),
    ],
)
def test_bad_and_unsupported_fields_are_400_and_named(fields, param):
    answer = call("POST", CHAT, json={**ASK, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (
        400,
        "invalid_request_error",
        param,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 1}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_bad_fields_of_a_completion_are_400_and_named(fields, param):
    answer = call("POST", COMPLETIONS, json={"model": "echo", "prompt": "a", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("prompt", [None, 1, [1, "a"], [[1], "a"], [-1], {"a": 1}, [[]] * 200])
def test_a_prompt_of_another_kind_is_400(prompt):
    answer = call("POST", COMPLETIONS, json={"model": "echo", "prompt": prompt})
    assert answer.status_code == 400


S, U, A = (say(role, role=role) for role in ("system", "user", "assistant"))


@pytest.mark.parametrize("messages", [[U], [S, U], [U, A, U], [S, U, A, U, A, U]])
def test_roles_in_order_pass(messages):
    assert call("POST", CHAT, json={**ASK, "messages": messages}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([A], "messages.0.role"),
        ([S], "messages"),
        ([U, A], "messages"),
        ([U, U], "messages.1.role"),
        ([U, S, U], "messages.1.role"),
        ([S, S, U], "messages.1.role"),
        ([S, A, U], "messages.1.role"),
        ([U, A, A, U], "messages.2.role"),
    ],
)
def test_roles_out_of_order_are_400_with_the_first_that_is(messages, param):
    answer = call("POST", CHAT, json={**ASK, "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff", b'{"a": NaN}', b"[" * 10_000])
def test_a_body_that_is_no_object_is_400(content):
    answer = call("POST", CHAT, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ('{"model": "echo",', "application/json", "the body is not valid JSON, at character 17"),
        (
            '{"model": "echo"}',
            "application/x-www-form-urlencoded",  # what curl sends unless it is told
            "the body must be a JSON object, with content-type application/json",
        ),
    ],
)
def test_what_is_wrong_with_a_body_as_a_whole_is_said(content, kind, message):
    answer = call("POST", CHAT, content=content, headers={"content-type": kind})
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["param"]) == (400, message, None)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        ("too long", 400, "context_length_exceeded"),
        ("odd", 400, None),
        ("too many", 429, "overloaded"),
        ("crash", 500, None),
    ],
)
def test_errors_of_the_backend_have_openai_form(content, status, code, is_stream):
    answer = call("POST", CHAT, json=ask(content, stream=is_stream))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("content", "status", "code"), [("too slow", 504, "timeout"), ("late crash", 500, None)]
)
def test_errors_while_an_answer_is_made_have_openai_form(content, status, code):
    answer = call("POST", CHAT, json=ask(content))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text


@pytest.mark.parametrize(("content", "code"), [("too slow", "timeout"), ("late crash", None)])
def test_a_stream_that_fails_ends_with_the_error_and_no_end_mark(content, code):
    answer = call("POST", CHAT, json=ask(content, stream=True))
    *begun, last = answer.text.strip().split("\n\n")
    assert len(begun) == 4  # the role and three letters
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert "secret" not in answer.text
    assert "[DONE]" not in answer.text


def test_a_refusal_for_want_of_room_says_when_to_come_again():
    answer = call("POST", CHAT, json=ask("too many"))
    assert answer.headers["retry-after"] == "1"
    error = {"message": "no room", "type": "server_error", "param": None, "code": "overloaded"}
    assert answer.json() == {"error": error}
    assert "retry-after" not in call("POST", CHAT, json={}).headers


SECRET = "my secret words, and a key sk-123"


@pytest.mark.parametrize(
    "body",
    [
        {**ASK, SECRET: 1},
        {**ASK, "model": SECRET},
        {**ASK, "messages": [{"role": SECRET, "content": "x"}]},
        {**ASK, "messages": [{"role": "user", "content": {SECRET: SECRET}}]},
        {**ASK, "messages": SECRET},
        {**ASK, "temperature": SECRET},
        {**ASK, "stop": [SECRET, 1]},
    ],
)
def test_an_error_repeats_nothing_that_was_sent(body):
    answer = call("POST", CHAT, json=body)
    assert answer.status_code in (400, 404)
    assert "secret" not in answer.text


def test_an_unknown_model_is_404():
    for path, body in ((CHAT, ASK), (COMPLETIONS, {"prompt": "a"})):
        answer = call("POST", path, json={**body, "model": "other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_unknown_route_is_404_and_a_wrong_method_405_in_openai_form():
    answer = call("GET", "/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Not Found")
    answer = call("GET", CHAT)
    assert (answer.status_code, answer.json()["error"]["message"]) == (405, "Method Not Allowed")


def test_the_model_is_listed():
    assert [m["id"] for m in call("GET", "/v1/models").json()["data"]] == ["echo"]


def test_empty_stop_texts_are_left_out():
    assert ChatRequest(**ASK, stop=["", "x"]).stop_texts == ("x",)
    assert ChatRequest(**ASK, stop="x").stop_texts == ("x",)
