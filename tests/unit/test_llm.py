"""The client against a real HTTP server: answers, retries, errors and the endpoint check."""

import asyncio
import json
import pickle
import re
import socket
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonserver import JsonHandler, running

from step_ray.calls import replylimit
from step_ray.calls.firstcall import check_chat, check_endpoint
from step_ray.calls.spending import NOTHING, Spending
from step_ray.collection.teacher_config import Price
from step_ray.errors import (
    BudgetError,
    ConfigError,
    ContextLengthError,
    EndpointError,
    LLMError,
)
from step_ray.llm import Deadline, OpenAIChat, ScriptedLLM
from step_ray.types import Message

MESSAGES = [Message(role="user", content="hello")]


def answer(text="hi", **changes):
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
    return 200, {}, body | changes


def fault(status, message="busy", headers=None, **error):
    return status, headers or {}, {"error": {"message": message, **error}}


MODELS = 200, {}, {"object": "list", "data": [{"id": "m", "object": "model"}]}


class Handler(JsonHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._reply()

    def do_POST(self):
        self._reply()

    def _reply(self):
        length = int(self.headers.get("content-length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        server = self.server
        with server.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.requests.append((self.path, headers, body))
            number = len(server.requests) - 1
        script = server.script
        status, headers, data = script(number) if callable(script) else script[number]
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(raw)))
        with suppress(ConnectionError):  # a client that gave up
            self.end_headers()
            self.wfile.write(raw)


def serving(*script):
    """A server that answers in the order of the script."""
    script = script[0] if callable(script[0]) else script
    return running(Handler, script=script, requests=[], lock=threading.Lock())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complete(url, *, max_retries=5, client=(), **options):
    async def send():
        settings = {"api_key": "secret", "max_retries": max_retries} | dict(client)
        chat = OpenAIChat(base_url=url, model="m", **settings)
        try:
            return await chat.complete(MESSAGES, **{"max_tokens": 5} | options)
        finally:
            await chat.aclose()

    return asyncio.run(send())


# One request


def test_an_answer_comes_with_its_tokens():
    with serving(answer()) as server:
        got = complete(server.url)
    assert (got.text, got.prompt_tokens, got.completion_tokens) == ("hi", 7, 2)
    assert (got.finish_reason, got.retries) == ("stop", 0)


def test_the_request_says_all_that_was_asked_for():
    with serving(answer()) as server:
        complete(server.url, temperature=0.5, seed=3, session_id="t#1", json_schema={"name": "v"})
        path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["x-session-id"] == "t#1"
    assert headers["authorization"] == "Bearer secret"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "v"}},
    }


def test_what_was_not_asked_for_is_not_in_the_request():
    with serving(answer()) as server:
        complete(server.url)
        _, headers, body = server.requests[0]
    assert set(body) == {"model", "messages", "max_tokens", "temperature"}
    assert "x-session-id" not in headers


@pytest.mark.parametrize("kind", ["text/plain", ""])
def test_an_answer_that_does_not_say_that_it_is_json_is_read(kind):
    status, _, body = answer()
    with serving((status, {"content-type": kind}, json.dumps(body).encode())) as server:
        assert complete(server.url).text == "hi"


def test_an_answer_without_text_or_usage_is_empty():
    with serving(answer(text=None, usage=None)) as server:
        got = complete(server.url)
    assert (got.text, got.prompt_tokens, got.completion_tokens) == ("", 0, 0)


def test_one_client_serves_many_calls_and_opens_again_after_closing():
    async def send(url):
        chat = OpenAIChat(base_url=url, model="m")
        texts = []
        for _ in range(2):
            both = await asyncio.gather(*(chat.complete(MESSAGES, max_tokens=5) for _ in range(2)))
            texts += [got.text for got in both]
            await chat.aclose()
        return texts

    with serving(lambda number: answer()) as server:
        assert asyncio.run(send(server.url)) == ["hi"] * 4


# Retries


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_fault_is_retried_and_counted(status):
    with serving(fault(status), answer()) as server:
        got = complete(server.url)
        assert (got.text, got.retries, len(server.requests)) == ("hi", 1, 2)


def test_the_wait_is_at_least_what_the_server_asks_for():
    open_again = []

    def busy_for_a_second(number):
        open_again.append(time.monotonic() + 1.0)
        early = time.monotonic() < open_again[0]
        return fault(503, headers={"retry-after": "1.1"}) if early else answer()

    # without the header the client would come back after 0.75 s at most, and give up
    with serving(busy_for_a_second) as server:
        assert complete(server.url, max_retries=1).retries == 1


def test_a_retry_after_that_has_passed_is_ignored():
    later = {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}
    with serving(fault(503, headers=later), answer()) as server:
        assert complete(server.url).retries == 1


def test_a_fault_that_does_not_pass_is_an_error_with_the_number_of_tries():
    with serving(lambda number: fault(503, "overloaded")) as server:
        with pytest.raises(LLMError) as caught:
            complete(server.url, max_retries=1)
        assert str(caught.value).startswith(f"m at {server.url}: gave up after 2 tries: ")
        assert "overloaded" in str(caught.value)
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_fault_of_the_request_is_not_retried(status):
    with serving(fault(status, "wrong\nkey")) as server:
        with pytest.raises(LLMError) as caught:
            complete(server.url)
        assert str(caught.value).startswith(f"m at {server.url}: HTTP {status}: ")
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, ContextLengthError)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "error",
    [
        {"message": "too long", "code": "context_length_exceeded"},
        {"message": "This model's maximum context length is 64 tokens. However, you sent 90."},
        {"message": "The decoder prompt is longer than the maximum model length of 64."},
    ],
)
def test_a_prompt_that_does_not_fit_is_a_context_length_error(error):
    with serving(fault(400, **error)) as server:
        with pytest.raises(ContextLengthError, match=r"^m: "):
            complete(server.url)
        assert len(server.requests) == 1


def test_a_refused_connection_is_an_error_that_names_the_address():
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    line = rf"^m at {url}: gave up after 2 tries: Cannot connect to host 127.0.0.1:{port}"
    with pytest.raises(LLMError, match=line):
        complete(url, max_retries=1)


@pytest.mark.parametrize("body", [b"<html>", b"{", b"", {"choices": []}, {"choices": None}, []])
def test_a_success_that_is_no_completion_is_retried(body):
    with serving((200, {}, body), answer()) as server:
        assert complete(server.url).retries == 1
    gave_up = pytest.raises(LLMError, match="gave up after 1 tries: no chat completion")
    with serving((200, {}, body)) as server, gave_up:
        complete(server.url, max_retries=0)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"{", "JSONDecodeError"),
        ({"choices": []}, "choices: List should have at least 1 item"),
        ({"choices": [{"message": {"content": ["secret"]}}]}, "choices.0.message.content: Input"),
        (answer(usage={"prompt_tokens": "many"})[2], "usage.prompt_tokens: Input should be a"),
        (answer(usage={"prompt_tokens": -1})[2], "usage.prompt_tokens: Input should be greater"),
    ],
)
def test_what_makes_an_answer_no_completion_is_said_without_its_words(body, why):
    with serving((200, {}, body)) as server, pytest.raises(LLMError) as caught:
        complete(server.url, max_retries=0)
    assert f"no chat completion ({why}" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_empty_purse_is_not_retried():
    with serving(fault(429, "no quota", code="insufficient_quota")) as server:
        with pytest.raises(LLMError, match="HTTP 429"):
            complete(server.url)
        assert len(server.requests) == 1


# Time


@contextmanager
def hanging(*script):
    """A server that never answers where the script says None."""
    over, arrived = threading.Event(), threading.Event()

    def reply(number):
        arrived.set()
        if script[number] is not None:
            return script[number]
        over.wait(30)
        return fault(503)

    with serving(reply) as server:
        server.arrived = arrived
        try:
            yield server
        finally:
            over.set()


def test_a_try_that_hangs_is_sent_again():
    with hanging(None, *[answer()] * 5) as server:
        assert complete(server.url, client={"timeout_s": 0.5}).retries >= 1


def test_a_call_has_a_deadline_whatever_its_tries_have():
    with hanging(None) as server, pytest.raises(LLMError) as caught:
        complete(server.url, client={"timeout_s": 60.0, "call_timeout_s": 0.3})
    assert str(caught.value) == f"m at {server.url}: no answer within 0.3 s"


def test_a_call_that_is_cancelled_goes_at_once_and_settles():
    async def scene(url, gate):
        chat = OpenAIChat(base_url=url, model="m", gate=gate)
        call = asyncio.create_task(chat.complete(MESSAGES, max_tokens=5))
        await asyncio.to_thread(server.arrived.wait)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await chat.aclose()

    gate = Gate()
    with hanging(None) as server:
        asyncio.run(scene(server.url, gate))
    assert gate.events == [("enter", GUESS, False), ("leave", GUESS, NOTHING)]


def test_the_time_of_a_call_stands_still_while_it_waits_for_its_turn():
    async def scene():
        deadline, passed = Deadline(0.05), []
        with pytest.raises(TimeoutError):
            async with deadline.scope:
                await asyncio.sleep(0.1)  # longer than all that the call has
                passed.append("the wait")
                with deadline.running():
                    await asyncio.Event().wait()
        return passed, deadline.scope.expired()

    assert asyncio.run(scene()) == (["the wait"], True)


# The gate


class Gate:
    """Lets all through and writes down what it is told."""

    def __init__(self):
        self.events = []

    async def enter(self, estimate, *, again=False):
        self.events.append(("enter", estimate, again))

    def leave(self, estimate, actual):
        self.events.append(("leave", estimate, actual))

    def pause(self, seconds):
        self.events.append(("pause", seconds))


PRICE = Price(prompt=1e6, completion=2e6)  # 1 and 2 a token
GUESS = Spending(calls=1, tokens=2 + 5)  # `hello` is at most 2 tokens, and max_tokens is 5
GUESS_PAID = Spending(calls=1, tokens=7, money=2 + 2 * 5)
PAID = Spending(calls=1, tokens=7 + 2, money=7 + 2 * 2)


def test_a_call_enters_with_what_it_may_cost_and_leaves_with_what_it_did():
    gate = Gate()
    with serving(answer()) as server:
        got = complete(server.url, client={"gate": gate, "price": PRICE})
    assert gate.events == [("enter", GUESS_PAID, False), ("leave", GUESS_PAID, PAID)]
    assert got.cost == 11.0


def test_a_retry_asks_again_and_tells_everybody_what_the_endpoint_wants():
    gate = Gate()
    with serving(fault(429, headers={"retry-after": "0.25"}), answer()) as server:
        complete(server.url, client={"gate": gate})
    kinds = [event[0] for event in gate.events]
    assert kinds == ["enter", "pause", "enter", "leave"]
    assert gate.events[1:3] == [("pause", 0.25), ("enter", GUESS, True)]


@pytest.mark.parametrize("value", ["-5", "nan", "inf", "soon"])
def test_a_retry_after_that_is_no_time_is_no_pause(value):
    gate = Gate()
    with serving(fault(429, headers={"retry-after": value}), answer()) as server:
        complete(server.url, client={"gate": gate})
    assert [event[0] for event in gate.events] == ["enter", "enter", "leave"]


def test_a_call_that_failed_cost_nothing():
    gate = Gate()
    with serving(fault(400)) as server, pytest.raises(LLMError):
        complete(server.url, client={"gate": gate})
    assert gate.events[-1] == ("leave", GUESS, NOTHING)


def test_an_answer_without_usage_costs_what_it_might():
    gate = Gate()
    with serving(answer(usage=None)) as server:
        complete(server.url, client={"gate": gate, "price": PRICE})
    assert gate.events[-1] == ("leave", GUESS_PAID, GUESS_PAID)


def test_without_budget_nothing_is_sent():
    class Spent(Gate):
        async def enter(self, estimate, *, again=False):
            raise BudgetError("spent")

    with serving(answer()) as server:
        with pytest.raises(BudgetError, match=r"^spent$"):
            complete(server.url, client={"gate": Spent()})
        assert server.requests == []


# Structured output where there is none


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "words", ["Unknown parameter: 'response_format'.", "json_schema is not supported"]
)
def test_an_endpoint_without_schemas_is_asked_once_and_remembered(status, words):
    async def send(url):
        chat = OpenAIChat(base_url=url, model="m", max_retries=0)
        schema = {"max_tokens": 5, "json_schema": {"name": "v"}}
        first = await chat.complete(MESSAGES, **schema)
        second = await chat.complete(MESSAGES, **schema)
        third = await chat.complete(MESSAGES, max_tokens=5)
        await chat.aclose()
        return first, second, third

    with serving(fault(status, words), answer(), answer(), answer()) as server:
        answers = asyncio.run(send(server.url))
        sent = ["response_format" in body for _, _, body in server.requests]
    assert sent == [True, False, False, False]
    assert [got.unstructured for got in answers] == [True, True, False]
    assert [got.retries for got in answers] == [1, 0, 0]


def test_a_refusal_of_something_else_is_an_error():
    with serving(fault(400, "temperature is too high")) as server:
        with pytest.raises(LLMError, match="temperature is too high"):
            complete(server.url, json_schema={"name": "v"})
        assert len(server.requests) == 1


# What is shown


@pytest.mark.parametrize("key", ["sk-1234567890", 'sk-"quoted"', "sk-back\\slash"])
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_a_key_that_the_endpoint_repeats_is_not_shown(key, status):
    echo = fault(status, f"bad header Authorization: Bearer {key}")
    with serving(echo) as server, pytest.raises(LLMError) as caught:
        complete(server.url, max_retries=0, client={"api_key": key})
    shown = "".join(traceback.format_exception(caught.value))
    assert "Bearer <key>" in str(caught.value)
    assert key not in shown
    assert repr(key)[1:-1] not in shown
    assert key not in str(pickle.loads(pickle.dumps(caught.value)).__dict__)


def test_a_page_of_words_is_shown_in_part_with_what_is_left_out():
    with serving(fault(400, "x" * 1000)) as server, pytest.raises(LLMError) as caught:
        complete(server.url)
    assert re.search(r"x{200,}\.\.\. \(\d+ characters more\)$", str(caught.value))


@given(session=st.text(min_size=1))
def test_any_session_id_can_be_sent(session):
    sent = quote(session, safe="/#: ")
    assert sent.isascii()
    assert sent.isprintable()
    assert unquote(sent) == session


def test_the_session_id_of_a_task_in_any_script_is_a_header():
    with serving(answer()) as server:
        complete(server.url, session_id="welt/tür 3\n#1")
        assert server.requests[0][1]["x-session-id"] == "welt/t%C3%BCr 3%0A#1"


# The check before a run


def check(url, model="m"):
    check_endpoint("teacher", url, model, "secret", timeout_s=5.0)


def test_an_endpoint_that_serves_the_model_passes():
    with serving(MODELS) as server:
        check(server.url)
        path, headers, _ = server.requests[0]
        assert (path, headers["authorization"]) == ("/v1/models", "Bearer secret")


@pytest.mark.parametrize("script", [fault(404), (200, {}, {"object": "list", "data": []})])
def test_an_endpoint_that_lists_no_models_passes(script):
    with serving(script) as server:
        check(server.url)


def test_another_model_is_refused_with_what_is_there():
    with serving(MODELS) as server, pytest.raises(EndpointError) as caught:
        check(server.url, model="big")
    assert str(caught.value) == f"teacher.model: 'big' is not served at {server.url}; it has ['m']"


def test_a_refused_key_names_the_status():
    with serving(fault(401)) as server, pytest.raises(EndpointError) as caught:
        check(server.url)
    assert str(caught.value) == (
        f"teacher.base_url: '{server.url}' answered HTTP 401; check the key and URL"
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/v1", "localhost:{}/v1", ""])
def test_an_address_where_nobody_answers_is_named(url):
    url = url.format(free_port())
    with pytest.raises(EndpointError) as caught:
        check(url)
    assert str(caught.value) == (
        f"teacher.base_url: {url!r} cannot be reached; start the server or mend the URL"
    )


@pytest.mark.parametrize(
    "page", [(200, {"content-type": "text/html"}, b"<html>"), (200, {}, {"status": "ok"})]
)
def test_a_page_that_is_no_openai_endpoint_is_named(page):
    with serving(page) as server, pytest.raises(EndpointError) as caught:
        check(server.url)
    assert str(caught.value) == (
        f"teacher.base_url: '{server.url}' gives no OpenAI answer; mend the URL or the key"
    )


# The scripted model


def test_a_script_is_answered_in_order_and_remembers_its_calls():
    model = ScriptedLLM(["one two", LLMError("down")], name="s")
    assert asyncio.run(model.complete(MESSAGES, max_tokens=5)).text == "one two"
    with pytest.raises(LLMError, match=r"^down$"):
        asyncio.run(model.complete(MESSAGES, max_tokens=5))
    assert model.calls == [tuple(MESSAGES)] * 2
    with pytest.raises(ConfigError, match=r"^s: the script has only 2 answers$"):
        asyncio.run(model.complete(MESSAGES, max_tokens=5))


def test_a_script_may_be_a_function_of_the_messages():
    model = ScriptedLLM(lambda messages: messages[-1].content.upper())
    assert asyncio.run(model.complete(MESSAGES, max_tokens=5)).text == "HELLO"


# A reply without an end


@pytest.mark.parametrize("status", [200, 500])
def test_a_reply_that_never_stops_is_cut_and_sent_again(status, monkeypatch):
    monkeypatch.setattr(replylimit, "MAX_REPLY_BYTES", 100_000)
    sent = []

    class Endless(JsonHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            sent.append(0)
            self.send_response(status)
            self.end_headers()
            with suppress(ConnectionError):
                while True:
                    self.wfile.write(b" " * 10_000)
                    sent[-1] += 10_000

    with (
        running(Endless) as server,  # its handlers have seen at the end that nobody listens
        pytest.raises(LLMError, match=r"gave up after 2 tries: the reply has more than 100,000"),
    ):
        complete(server.url, max_retries=1)
    assert len(sent) == 2


def test_a_packed_reply_is_not_asked_for():
    with serving(answer()) as server:
        complete(server.url)
        assert server.requests[0][1]["accept-encoding"] == "identity"


# An endpoint that refuses for good


def refusal_after(*script):
    async def send(url):
        chat = OpenAIChat(base_url=url, model="m", max_retries=0)
        for _ in script:
            with suppress(LLMError):
                await chat.complete(MESSAGES, max_tokens=5)
        await chat.aclose()
        return chat.refusal

    with serving(*script) as server:
        return asyncio.run(send(server.url)).replace(server.url, "URL")


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_an_endpoint_that_has_never_answered_refuses_for_good(status):
    assert refusal_after(fault(status, "who are you")).startswith(f"m at URL: HTTP {status}: ")


def test_an_account_without_money_is_a_refusal():
    assert "HTTP 429" in refusal_after(fault(429, code="insufficient_quota"))


@pytest.mark.parametrize("script", [(answer(), fault(404)), (fault(400),), (fault(500),)])
def test_what_answered_once_or_may_pass_or_is_about_the_request_is_none(script):
    assert refusal_after(*script) == ""


def ask(script, **options):
    with serving(script) as server:
        settings = {"timeout_s": 5.0, "tokens": ("teacher.max_tokens", 512), **options}
        try:
            check_chat("teacher", server.url, "m", "secret-key", **settings)
        except EndpointError as exc:
            return str(exc).replace(server.url, "URL"), server.requests
        return "", server.requests


def test_the_question_before_a_run_asks_for_as_much_as_a_call_will():
    line, ((path, _, body),) = ask(answer())
    assert (line, path) == ("", "/v1/chat/completions")
    assert (body["model"], body["max_tokens"]) == ("m", 512)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (
            fault(401, "bad key secret-key"),
            "teacher.base_url: 'URL' refuses a chat request; check the key and the model"
            " (HTTP 401: Error code: 401 - bad key <key>)",
        ),
        (
            fault(404, "no such model"),
            "teacher.model: URL has no 'm' (HTTP 404: Error code: 404 - no such model)",
        ),
        (
            fault(400, "This model's maximum context length is 256 tokens"),
            "teacher.max_tokens: 512 do not fit the context of 'm'; lower it (HTTP 400: Error code:"
            " 400 - This model's maximum context length is 256 tokens)",
        ),
    ],
)
def test_what_every_call_would_be_refused_for_is_said_before(script, line):
    assert ask(script)[0] == line


@pytest.mark.parametrize("script", [fault(429), fault(503), (200, {}, b"<html>")])
def test_what_may_pass_is_left_to_the_calls(script):
    assert ask(script)[0] == ""
