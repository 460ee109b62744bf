"""The OpenAI routes over a backend that repeats the last message, without Ray."""

import asyncio
import json

import httpx
import pytest

from step_ray.openai_api import ApiError, ChatAnswer, ChatRequest, key_digest, make_api

CHAT = "/v1/chat/completions"
ASK = {"model": "echo", "messages": [{"role": "user", "content": "go"}]}


class Echo:
    model = "echo"

    async def chat(self, request):
        text = request.messages[-1].to_message().content
        if text == "too long":
            raise ApiError(400, "it does not fit", code="context_length_exceeded")
        if text == "too many":
            raise ApiError(503, "no room", kind="server_error", code="overloaded", retry_after_s=1)
        if text == "crash":
            raise RuntimeError("secret detail")
        return ChatAnswer(text=text, finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def call(method, path, *, key="", api_key="", headers=None, **kwargs):
    async def send():
        api = make_api(Echo(), key_digest(api_key) if api_key else "")
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        sent = {**(headers or {}), **({"authorization": f"Bearer {key}"} if key else {})}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, headers=sent, **kwargs)

    return asyncio.run(send())


def test_a_chat_is_answered_with_its_usage():
    body = call("POST", CHAT, json=ASK).json()
    assert body["choices"][0]["message"]["content"] == "go"
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = [body["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert usage == [3, 2, 5]


def test_a_refusal_for_want_of_room_is_openais_error_and_says_when_to_come_again():
    answer = call("POST", CHAT, json={**ASK, "messages": [{"role": "user", "content": "too many"}]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    error = {"message": "no room", "type": "server_error", "param": None, "code": "overloaded"}
    assert answer.json() == {"error": error}
    assert "retry-after" not in call("POST", CHAT, json={}).headers


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "go "}, {"type": "text", "text": "on"}]
    ask = {**ASK, "messages": [{"role": "user", "content": parts}]}
    assert call("POST", CHAT, json=ask).json()["choices"][0]["message"]["content"] == "go on"


def test_a_stream_carries_text_reason_usage_and_end():
    ask = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    answer = call("POST", CHAT, json=ask)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.text.strip().split("\n\n")
    text, reason, usage = (json.loads(event.removeprefix("data: ")) for event in events)
    assert text["choices"][0]["delta"] == {"role": "assistant", "content": "go"}
    assert reason["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)
    assert end == "data: [DONE]"


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
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
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


@pytest.mark.parametrize("content", [b"{", b"[]", b""])
def test_a_body_that_is_no_object_is_400(content):
    answer = call("POST", CHAT, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [("too long", 400, "context_length_exceeded"), ("crash", 500, None)],
)
def test_errors_of_the_backend_have_openai_form(content, status, code):
    ask = {**ASK, "messages": [{"role": "user", "content": content}]}
    answer = call("POST", CHAT, json=ask)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text


def test_an_unknown_model_is_404():
    answer = call("POST", CHAT, json={**ASK, "model": "other"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_an_unknown_route_is_404_in_openai_form():
    answer = call("GET", "/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Not Found")


def test_the_model_is_listed():
    assert [m["id"] for m in call("GET", "/v1/models").json()["data"]] == ["echo"]


@pytest.mark.parametrize(("key", "status"), [("", 401), ("wrong", 401), ("right", 200)])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", CHAT)])
def test_a_key_is_asked_for(method, path, key, status):
    body = ASK if method == "POST" else None
    assert call(method, path, api_key="right", key=key, json=body).status_code == status


def test_a_bad_body_without_key_is_401():
    assert call("POST", CHAT, api_key="right", json={}).status_code == 401


def test_health_needs_no_key():
    assert call("GET", "/health", api_key="right").status_code == 200


def test_empty_stop_texts_are_left_out():
    assert ChatRequest(**ASK, stop=["", "x"]).stop_texts == ("x",)
    assert ChatRequest(**ASK, stop="x").stop_texts == ("x",)
