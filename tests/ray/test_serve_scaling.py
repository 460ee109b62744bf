"""Replicas that come, go and die while clients ask: nothing that was asked is lost."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager

import openai
import pytest
from ray import serve
from served_models import MAX_LENGTH, expected, save_varied_model

from step_ray.collection.runner import Address
from step_ray.config import parse_config
from step_ray.envs import task_source
from step_ray.evaluate import evaluate
from step_ray.llm import OpenAIChat
from step_ray.serve import APP_NAME, deploy
from step_ray.serving.config import AutoscalingConfig, ServeConfig
from step_ray.store import read_trajectories
from step_ray.tasks import write_tasks
from step_ray.types import ERROR_STOPS, Message

pytestmark = pytest.mark.slow

CONFIG = ServeConfig(port=0, num_replicas=2, max_batch_size=8, drain_timeout_s=60)
NUM_TOKENS = 100
TEXTS = [f"You are in room {i}." for i in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with the answer of each to every text."""
    found = []
    for seed in range(2):
        folder = save_varied_model(tmp_path_factory.mktemp(f"model{seed}"), seed)
        answers = {text: expected(folder, text, NUM_TOKENS)[1].text for text in TEXTS}
        found.append((folder, answers))
    return found


@pytest.fixture
def served(ray_cluster):
    """Deploys under one name, and ends what was deployed."""
    endpoints = []

    def serve_model(folder, config=CONFIG):
        endpoints.append(deploy(folder, "agent", config, max_length=MAX_LENGTH))
        return endpoints[-1]

    yield serve_model
    endpoints[-1].close()


class Load:
    """What came of the questions of some clients."""

    def __init__(self):
        self.answers, self.faults, self.num_retries = Counter(), [], 0

    @property
    def num_answers(self):
        return self.answers.total()


@contextmanager
def asking(client, num_clients):
    """Let clients ask one question after the other as long as the block runs.

    `client()` gives an async context manager, and that a function of a session and a text.
    """
    load, has_ended = Load(), threading.Event()

    async def one(number, ask):
        index = number
        while not has_ended.is_set():
            text = TEXTS[index % len(TEXTS)]
            index += 1
            try:
                answer, retries = await ask(f"session-{number}-{index // 4}", text)
                load.answers[text, answer] += 1
                load.num_retries += retries
            except Exception as exc:
                load.faults.append(exc)
                await asyncio.sleep(0.1)

    async def all_of_them():
        async with client() as ask:
            await asyncio.gather(*(one(number, ask) for number in range(num_clients)))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    try:
        yield load
    finally:
        has_ended.set()
        thread.join(120)
    assert not thread.is_alive()


def our_client(endpoint, max_retries):
    """The client of collection and evaluation."""

    class Client:
        async def __aenter__(self):
            self.chat = OpenAIChat(
                base_url=endpoint.base_url, model="agent", max_retries=max_retries
            )
            return self.ask

        async def ask(self, session, text):
            message = Message(role="user", content=text)
            got = await self.chat.complete([message], max_tokens=NUM_TOKENS, session_id=session)
            return got.text, got.retries

        async def __aexit__(self, *exc):
            await self.chat.aclose()

    return Client


def openai_client(endpoint, max_retries):
    """The official client."""

    class Client:
        async def __aenter__(self):
            self.client = openai.AsyncOpenAI(
                base_url=endpoint.base_url, api_key="none", max_retries=max_retries
            )
            return self.ask

        async def ask(self, session, text):
            raw = await self.client.chat.completions.with_raw_response.create(
                model="agent",
                messages=[{"role": "user", "content": text}],
                max_tokens=NUM_TOKENS,
                temperature=0,
                extra_headers={"x-session-id": session},
            )
            return raw.parse().choices[0].message.content, raw.retries_taken

        async def __aexit__(self, *exc):
            await self.client.close()

    return Client


def num_running():
    """Replicas that answer."""
    (deployment,) = serve.status().applications[APP_NAME].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def replica_pids():
    from ray._private.state import actors  # the public list needs the dashboard

    return [
        actor["Pid"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and "AgentServer" in (actor["Name"] or "")
    ]


def wait_for(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wait_for_answers(load, number):
    wanted = load.num_answers + number
    wait_for(lambda: load.num_answers >= wanted)


def test_load_makes_replicas_grow_and_its_end_makes_them_go(served, models):
    folder, answers = models[0]
    scaling = AutoscalingConfig(
        **{"max_replicas": 3, "target_ongoing_requests": 2},
        **{"upscale_delay_s": 0.5, "downscale_delay_s": 1, "look_back_period_s": 11},
    )
    config = CONFIG.model_copy(update={"num_replicas": 1, "autoscaling": scaling})
    endpoint = served(folder, config)
    assert num_running() == 1
    client = our_client(endpoint, max_retries=0)
    with asking(client, 1) as light:
        with asking(client, 12) as heavy:
            wait_for(lambda: num_running() == 3)
            wait_for_answers(heavy, 50)
        wait_for(lambda: num_running() == 1 and len(replica_pids()) == 1)
        wait_for_answers(light, 10)
    assert light.faults == heavy.faults == []
    assert set(light.answers) | set(heavy.answers) == set(answers.items())


@pytest.mark.parametrize("client", [our_client, openai_client])
def test_a_killed_replica_loses_no_request_that_is_sent_again(served, models, client):
    folder, answers = models[0]
    endpoint = served(folder)
    wait_for(lambda: num_running() == 2)
    with asking(client(endpoint, max_retries=4), 12) as load:
        wait_for_answers(load, 50)
        killed = replica_pids()[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in replica_pids() and len(replica_pids()) == 2)
        wait_for(lambda: num_running() == 2)
        wait_for_answers(load, 50)
    assert load.faults == []
    assert set(load.answers) == set(answers.items())
    assert load.num_retries > 0  # of those that the killed one had


def test_a_killed_replica_loses_no_episode_that_it_plays(ray_cluster, tmp_path):
    """`evaluate.where: agent`: each task once, those of the killed one begun again."""
    settings = {
        **{"name": "killed", "output_dir": str(tmp_path)},
        "student": {"max_length": 2048},
        "env": {"prompt": "alfworld_short", "max_steps": 16, "generator": {"size": "tiny"}},
        "tasks": {"num_expert": 1, "num_collect": 1, "num_eval": 24},
        "collect": {"max_new_tokens": 48},
        "evaluate": {"where": "agent", "concurrency": 6},
        "serve": {"port": 0, "num_replicas": 2},
    }
    config = parse_config(settings)
    source = task_source("alfworld")
    source.prepare(config)
    tasks = source.held_out_tasks(config, "valid_unseen")
    write_tasks(tmp_path / "tasks.parquet", tasks)
    endpoint = deploy("builtin:tiny-base", "agent", config.served, max_length=2048)
    came = []

    def kill_one(outcome):
        came.append(outcome)
        if len(came) == 4:
            os.kill(replica_pids()[0], signal.SIGKILL)

    try:
        evaluate(
            config,
            Address(base_url=endpoint.base_url, model="agent"),
            tasks_file=tmp_path / "tasks.parquet",
            out_dir=tmp_path / "played",
            on_episode=kill_one,
            where="agent",
        )
    finally:
        endpoint.close()
    played = read_trajectories(tmp_path / "played")
    assert sorted(t.task.task_id for t in played) == sorted(t.task_id for t in tasks)
    assert len(played) == len(came) == 24
    assert not {t.stop_reason for t in played} & ERROR_STOPS


def test_another_model_takes_over_without_a_failed_request(served, models):
    (first, old), (second, new) = models
    endpoint = served(first)
    pids = sorted(replica_pids())
    with asking(openai_client(endpoint, max_retries=0), 12) as load:
        wait_for_answers(load, 50)
        served(second)
        wait_for_answers(load, 50)
    assert load.faults == []
    assert set(load.answers) == set(old.items()) | set(new.items())
    assert sorted(replica_pids()) == pids  # no process was started


@pytest.mark.parametrize("changes", [{"num_replicas": 2}, {"num_replicas": 1}])
def test_other_settings_take_over_without_a_failed_request(served, models, changes):
    folder, answers = models[0]
    before = CONFIG.model_copy(update={**changes, "max_surge_percent": 100})
    endpoint = served(folder, before)
    pids = replica_pids()
    with asking(openai_client(endpoint, max_retries=0), 12) as load:
        wait_for_answers(load, 50)
        served(folder, before.model_copy(update={"max_batch_size": 4}))
        wait_for(lambda: not set(pids) & set(replica_pids()))
        wait_for_answers(load, 50)
    assert load.faults == []
    assert set(load.answers) == set(answers.items())
