"""Requests in the form that an endpoint reads: names of fields, extra fields, times to wait."""

import asyncio
import threading
import time

import httpx2
import pytest
from jsonserver import running
from test_llm import MESSAGES, Handler, answer, ask, complete, fault, serving

from step_ray.calls.endpoint import retry_after_s
from step_ray.config import parse_config
from step_ray.errors import ConfigError, LLMError
from step_ray.llm import OpenAIChat

NEWER_ONLY = fault(
    400,
    "Unsupported parameter: 'max_tokens' is not supported with this model."
    " Use 'max_completion_tokens' instead.",
    code="unsupported_parameter",
)
NO_SCHEMA = fault(400, "response_format is not supported")
ONE_TEMPERATURE = fault(400, "Unsupported value: 'temperature' does not support 0")


def test_an_endpoint_that_wants_the_newer_name_of_max_tokens_is_asked_once_and_remembered():
    async def send(url):
        chat = OpenAIChat(base_url=url, model="m", max_retries=0)
        answers = [await chat.complete(MESSAGES, max_tokens=5) for _ in range(2)]
        await chat.aclose()
        return answers

    with serving(NEWER_ONLY, answer(), answer()) as server:
        answers = asyncio.run(send(server.url))
        limits = [
            {name: body[name] for name in body if "max" in name} for _, _, body in server.requests
        ]
    assert limits == [{"max_tokens": 5}, *[{"max_completion_tokens": 5}] * 2]
    assert [got.retries for got in answers] == [1, 0]


def test_an_endpoint_may_refuse_two_things_one_after_the_other():
    with serving(NO_SCHEMA, NEWER_ONLY, answer()) as server:
        got = complete(server.url, json_schema={"name": "v"}, max_retries=0)
        sent = server.requests[-1][2]
    assert (got.unstructured, got.retries) == (True, 2)
    assert sent.keys() == {"model", "messages", "max_completion_tokens", "temperature"}


def test_a_limit_that_is_refused_under_its_newer_name_too_is_an_error():
    with serving(NEWER_ONLY, fault(400, "max_completion_tokens is too large: 5")) as server:
        with pytest.raises(LLMError, match="max_completion_tokens is too large"):
            complete(server.url)
        assert len(server.requests) == 2


def test_extra_fields_are_laid_over_ours_and_null_leaves_one_out():
    extra = {"reasoning_effort": "low", "temperature": 1, "seed": None}
    with serving(answer()) as server:
        complete(server.url, seed=7, client={"extra_body": extra})
        sent = server.requests[0][2]
    assert sent["reasoning_effort"] == "low"
    assert sent["temperature"] == 1
    assert "seed" not in sent


def test_the_question_before_a_run_has_the_settings_of_the_calls():
    line, ((_, _, body),) = ask(
        answer(), temperature=0.5, seed=3, extra_body={"reasoning_effort": "low"}
    )
    assert line == ""
    assert (body["temperature"], body["seed"], body["reasoning_effort"]) == (0.5, 3, "low")


def test_the_question_before_a_run_takes_the_newer_name_too():
    def newer_only(number):
        return answer() if number else NEWER_ONLY

    line, requests = ask(newer_only)
    assert (line, len(requests)) == ("", 2)
    assert requests[1][2]["max_completion_tokens"] == 512


def test_a_setting_that_every_call_would_be_refused_for_is_said_before_with_the_way_out():
    line, _ = ask(ONE_TEMPERATURE, temperature=0.0)
    assert line == (
        "teacher.base_url: 'URL' refuses a chat request; mend the setting that it names, or leave"
        " it out by teacher.extra_body (HTTP 400: Error code: 400 - Unsupported value:"
        " 'temperature' does not support 0)"
    )


class Crowded(Handler):
    """Counts how many requests it has at once."""

    def do_POST(self):
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(0.05)
        with self.server.lock:
            self.server.now -= 1
        self._reply()


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_calls_are_under_way_than_the_limit(limit):
    async def send(url):
        chat = OpenAIChat(base_url=url, model="m", max_concurrency=limit)
        await asyncio.gather(*[chat.complete(MESSAGES, max_tokens=5) for _ in range(9)])
        await chat.aclose()

    state = {"requests": [], "lock": threading.Lock(), "now": 0, "most": 0}
    with running(Crowded, script=lambda number: answer(), **state) as server:
        asyncio.run(send(server.url))
    assert server.most == limit


class Refused(Exception):
    """An error with the headers of a response."""

    def __init__(self, headers):
        self.response = httpx2.Response(429, headers=headers)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        (
            {
                "date": "Wed, 21 Oct 2015 07:28:00 GMT",
                "retry-after": "Wed, 21 Oct 2015 07:29:30 GMT",
            },
            90.0,
        ),
        ({"retry-after": "Wed, 21 Oct 2015 07:29:30 GMT"}, 0.0),
        ({"retry-after": "Wed, 99 Oct 2015"}, 0.0),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({}, 0.0),
    ],
)
def test_the_time_to_wait_is_read_in_each_form_that_endpoints_give_it(headers, seconds):
    assert retry_after_s(Refused(headers)) == seconds


def test_fields_that_other_settings_decide_are_no_extra_fields():
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "r", "teacher": {"extra_body": {"max_tokens": 9}}})
    assert str(caught.value).startswith(
        "teacher.extra_body: 'max_tokens' is not for extra_body; set teacher.model or max_tokens"
    )
