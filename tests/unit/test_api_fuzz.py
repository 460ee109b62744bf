"""A replica against requests that schemathesis makes from its own OpenAPI schema."""

import asyncio
import threading

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings

from step_ray.serving.agent_server import ReplicaBackend
from step_ray.serving.api.app import make_api
from step_ray.serving.config import AgentConfig, ServeConfig
from step_ray.training.student import resolve_init

schemathesis = pytest.importorskip("schemathesis")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402

pytestmark = pytest.mark.slow
KNOWN = {"model": "a", "environment": "alfworld", "split": "train"}
"""What a schema cannot say, so that requests get past the first check."""
UNKNOWN = {"/v1/agent/act": ("prompt", "history")}
ROUTES = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/agent/act"),
    ("POST", "/v1/episodes"),
]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """The schema of a running replica with the tiny base model."""
    agent = AgentConfig(
        prompt="alfworld_explore",
        work_dir=str(tmp_path_factory.mktemp("work")),
        max_new_tokens=2,
    )
    config = ServeConfig(agent=agent, max_new_tokens=3)
    spec = {"model_dir": resolve_init("builtin:tiny-base"), "served_name": "a", "max_length": 256}
    spec |= {"dtype": "float32", "max_queued_requests": 8}
    ready, servers, ports = threading.Event(), [], []

    async def serve():
        backend = ReplicaBackend(config, device="cpu", prefix_cache_mb=4)
        await backend.load(spec)
        app = make_api(backend, config, backend.counts)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        servers.append(server)
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        ports.append(server.servers[0].sockets[0].getsockname()[1])
        ready.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(60)
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{ports[0]}/openapi.json")
    servers[0].should_exit = True
    thread.join(60)


@pytest.mark.parametrize("kind", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_request_is_answered_by_a_server_error(api, method, path, kind):
    operation, seen = api[path][method], set()
    if kind is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("there is nothing to get wrong in it")

    @given(operation.as_strategy(generation_mode=kind))
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        if kind is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.update({key: KNOWN[key] for key in KNOWN if key in case.body})
            for key in ("max_tokens", "max_completion_tokens", *UNKNOWN.get(path, ())):
                case.body.pop(key, None)
        answer = case.call()
        seen.add(answer.status_code)
        case.validate_response(answer, checks=[not_a_server_error])
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    if kind is GenerationMode.POSITIVE and path != "/v1/episodes":
        assert 200 in seen


def test_the_schema_has_these_routes_and_no_others(api):
    assert {(op.ok().method.upper(), op.ok().path) for op in api.get_all_operations()} == set(
        ROUTES
    )
