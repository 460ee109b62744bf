"""What stands before the routes: keys, sizes, browsers, counts."""

import asyncio

import httpx
import pytest
from api_script import ASK, CHAT, call
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from step_ray.serving.api.errors import add_error_handlers
from step_ray.serving.api.guard import Counting, QueueLimit
from step_ray.serving.api.metrics import ServeMetrics, exposition

PATHS = ["/v1/models", "/metrics", "/docs", "/openapi.json", "/v1/nothing", "/"]


def samples(text):
    """(name, labels without the replica's) -> value."""
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k != "replica")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.mark.parametrize(("key", "status"), [("", 401), ("wrong", 401), ("right", 200)])
def test_a_key_is_asked_for(key, status):
    assert call("POST", CHAT, keys=["right"], key=key, json=ASK).status_code == status
    assert call("GET", "/v1/models", keys=["right"], key=key).status_code == status


@pytest.mark.parametrize("path", PATHS)
def test_every_path_but_health_asks_for_a_key_whether_or_not_it_exists(path):
    answer = call("GET", path, keys=["right"])
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_health_needs_no_key():
    assert call("GET", "/health", keys=["right"]).status_code == 200


def test_any_of_several_keys_lets_in():
    keys = ["one", "two"]
    found = [call("GET", "/v1/models", keys=keys, key=key).status_code for key in ("one", "two")]
    assert found == [200, 200]


@pytest.mark.parametrize("value", ["right", "Basic right", "Bearer", "Bearer right right"])
def test_a_key_in_another_form_does_not_let_in(value):
    headers = {"authorization": value}
    assert call("GET", "/v1/models", keys=["right"], headers=headers).status_code == 401


def test_a_bad_body_without_key_is_401():
    assert call("POST", CHAT, keys=["right"], json={}).status_code == 401


@pytest.mark.parametrize(("most", "statuses"), [(2, [200, 200, 429, 429]), (-1, [200] * 4)])
def test_more_open_requests_than_there_are_places_are_429(most, statuses):
    api = FastAPI()
    add_error_handlers(api)
    are_open = asyncio.Event()

    @api.post("/")
    async def wait() -> None:
        await are_open.wait()

    @api.get("/")
    async def look() -> None:
        are_open.set()

    api.add_middleware(QueueLimit, most=most, retry_after_s=7)

    async def send():
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            asked = [asyncio.create_task(client.post("/")) for _ in range(4)]
            await asyncio.sleep(0.05)
            looked = await client.get("/")  # what only reads is never refused
            return [await one for one in asked], looked, await client.post("/")

    answers, looked, later = asyncio.run(send())
    assert [answer.status_code for answer in answers] == statuses
    assert (looked.status_code, later.status_code) == (200, 200)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.headers["retry-after"] for answer in refused} <= {"7"}
    assert {answer.json()["error"]["code"] for answer in refused} <= {"overloaded"}


BIG = b'{"model": "' + b"x" * 2000 + b'"}'
JSON = {"content-type": "application/json"}


async def in_parts():
    for start in range(0, len(BIG), 100):
        yield BIG[start : start + 100]


@pytest.mark.parametrize("content", [lambda: BIG, in_parts])
def test_a_body_above_the_limit_is_413_with_and_without_a_length(content):
    answer = call("POST", CHAT, content=content(), headers=JSON, max_body_bytes=1024)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        413,
        "the request has more than 1024 bytes; send less",
    )


def test_a_body_at_the_limit_is_read():
    answer = call("POST", CHAT, content=BIG, headers=JSON, max_body_bytes=len(BIG))
    assert answer.status_code == 400


ASKING = {"origin": "https://page", "access-control-request-method": "POST"}


def test_a_browser_may_call_from_the_pages_that_are_listed():
    answer = call("OPTIONS", CHAT, headers=ASKING, keys=["right"], cors_origins=("https://page",))
    assert answer.headers["access-control-allow-origin"] == "https://page"
    other = {**ASKING, "origin": "https://other"}
    answer = call("OPTIONS", CHAT, headers=other, cors_origins=("https://page",))
    assert "access-control-allow-origin" not in answer.headers


def test_a_browser_may_call_from_no_page_by_default():
    assert call("OPTIONS", CHAT, headers=ASKING).status_code == 405


def test_requests_are_counted_by_route_and_status_and_never_by_what_the_client_wrote():
    metrics = ServeMetrics("r", lambda: 2, lambda: 5)
    for path in (CHAT, CHAT, "/v1/a-prompt", "/v1/another"):
        call("POST", path, json=ASK, metrics=metrics)
    call("POST", CHAT, json={}, metrics=metrics)
    found = samples(exposition([metrics.snapshot()]).decode())
    assert {k: v for k, v in found.items() if k[0] == "step_ray_requests_total"} == {
        ("step_ray_requests_total", CHAT, "200"): 2,
        ("step_ray_requests_total", CHAT, "400"): 1,
        ("step_ray_requests_total", "other", "404"): 2,
    }
    assert found["step_ray_request_seconds_count", CHAT] == 3
    assert found["step_ray_requests_running",] == 2
    assert found["step_ray_requests_waiting",] == 3


def test_a_stream_counts_its_first_text():
    metrics = ServeMetrics("r", lambda: 0, lambda: 0)
    call("POST", CHAT, json={**ASK, "stream": True}, metrics=metrics)
    call("POST", CHAT, json=ASK, metrics=metrics)
    found = samples(exposition([metrics.snapshot()]).decode())
    assert found["step_ray_first_piece_seconds_count",] == 1


def test_the_counts_of_several_replicas_stand_in_one_text():
    replicas = [ServeMetrics(name, lambda: 1, lambda: 1) for name in ("a", "b")]
    for number, replica in enumerate(replicas, start=1):
        replica.answered(10 * number, number, 0)
    text = exposition(replica.snapshot() for replica in replicas).decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    prompt = families["step_ray_prompt_tokens"].samples
    values = {s.labels["replica"]: s.value for s in prompt if s.name.endswith("_total")}
    assert values == {"a": 10, "b": 20}
    assert text.count("# TYPE step_ray_prompt_tokens_total counter") == 1


def test_a_client_that_goes_away_is_counted_as_499_and_a_crash_as_500():
    metrics, api = ServeMetrics("r", lambda: 0, lambda: 0), FastAPI()
    api.add_middleware(Counting, metrics=metrics)

    @api.get("/wait")
    async def wait(request: Request):
        await asyncio.sleep(60)

    @api.get("/crash")
    async def crash():
        raise RuntimeError

    async def send():
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            await client.get("/crash")
            task = asyncio.create_task(client.get("/wait"))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(send())
    found = samples(exposition([metrics.snapshot()]).decode())
    assert found["step_ray_requests_total", "/wait", "499"] == 1
    assert found["step_ray_requests_total", "/crash", "500"] == 1
