"""One replica over a tiny model, without Ray: it serves what was trained, within its limits."""

import asyncio
import json
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import torch

from step_ray.config import ScratchConfig
from step_ray.env_config import EnvConfig, GeneratorConfig
from step_ray.envs import REGISTRY
from step_ray.errors import ConfigError, ContextLengthError
from step_ray.react import conversation, initial_messages
from step_ray.render import Renderer
from step_ray.rollout import FORMAT_NOTICE
from step_ray.serving import episode_service
from step_ray.serving.agent_server import ReplicaBackend
from step_ray.serving.api.acting import act_messages
from step_ray.serving.api.agent_schemas import ActRequest
from step_ray.serving.api.app import make_api
from step_ray.serving.config import AgentConfig, ServeConfig
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.serving.local_model import new_tokens
from step_ray.storage.records import from_row
from step_ray.training.student import (
    check_model,
    load_model,
    load_tokenizer,
    new_model,
    resolve_init,
    save_student,
    train_tokenizer,
)
from step_ray.types import Author, Message, Step, StepKind, StopReason

MAX_LENGTH = 160
CHAT, ACT, EPISODES = "/v1/chat/completions", "/v1/agent/act", "/v1/episodes"
SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that gives varied text."""
    tokenizer = train_tokenizer(["You are in the middle of a room."], SHAPE.vocab_size)
    model = new_model(tokenizer, SHAPE, max_length=MAX_LENGTH, seed=0)
    torch.manual_seed(0)
    for layer in model.model.layers:
        for weight in layer.self_attn.parameters():
            torch.nn.init.normal_(weight, std=0.4)
    model.lm_head = torch.nn.Linear(SHAPE.hidden_size, len(tokenizer), bias=False)
    model.config.tie_word_embeddings = False
    path = str(tmp_path_factory.mktemp("model"))
    save_student(path, model, tokenizer)
    return path


def spec(folder, name="agent", **more):
    return {
        "model_dir": folder,
        "served_name": name,
        "max_length": MAX_LENGTH,
        "dtype": "float32",
        "max_queued_requests": 100,
        **more,
    }


@asynccontextmanager
async def replica(folder, *, config=None, **more):
    backend = ReplicaBackend(config or ServeConfig(), device="cpu", prefix_cache_mb=16)
    await backend.load(spec(folder, **more))
    transport = httpx.ASGITransport(make_api(backend, backend._config, backend.counts))
    async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
        yield backend, client
    backend._loaded.close()
    # torch must not be at work when the interpreter ends
    await until(lambda: backend._loaded.thread.has_ended)


def ask(text, **fields):
    messages = [{"role": "user", "content": text}]
    return {"model": "agent", "messages": messages, "max_tokens": 24, "temperature": 0, **fields}


def serve(folder, *bodies, path=CHAT, **options):
    """The answers to bodies that are sent at once."""

    async def send():
        async with replica(folder, **options) as (_, client):
            return await asyncio.gather(*[client.post(path, json=body) for body in bodies])

    return asyncio.run(send())


def streamed(answer, part):
    found = [json.loads(e.removeprefix("data: ")) for e in answer.text.split("\n\n")[:-2]]
    return [part(event["choices"][0]) for event in found]


def alone(folder, prompt, **wish):
    """What the model says without any server."""
    tokenizer = load_tokenizer(folder)
    generator = BatchGenerator(load_model(folder, "float32"), tokenizer, max_length=MAX_LENGTH)
    if not isinstance(prompt[0], int):
        prompt = Renderer(tokenizer, MAX_LENGTH).render_prompt(prompt)
    (got,) = generator.generate([prompt], [SamplingParams(**{"max_tokens": 24} | wish)])
    return prompt, got


def test_an_answer_is_the_models_own_with_exact_usage(folder):
    prompt, wanted = alone(folder, [Message(role="user", content="I go")])
    (answer,) = serve(folder, ask("I go"))
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (
        wanted.text,
        wanted.finish_reason,
    )
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(wanted.ids))


def test_streams_say_in_pieces_what_whole_answers_say(folder):
    texts = [f"You are in room {i}" for i in range(6)]
    whole = serve(folder, *[ask(text) for text in texts])
    streams = serve(folder, *[ask(text, stream=True) for text in texts])
    for one, stream in zip(whole, streams, strict=True):
        pieces = streamed(stream, lambda choice: choice["delta"].get("content", ""))
        assert "".join(pieces) == one.json()["choices"][0]["message"]["content"]
        assert len(pieces) > 10


def test_a_stop_text_never_shows_in_a_stream(folder):
    whole = alone(folder, [Message(role="user", content="I go")])[1].text
    stop = whole[5:8]
    (answer,) = serve(folder, ask("I go", stream=True, stop=[stop]))
    pieces = streamed(answer, lambda choice: choice["delta"].get("content", ""))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert streamed(answer, lambda choice: choice["finish_reason"])[-1] == "stop"


def test_a_completion_continues_text_and_ids_as_they_are(folder):
    ids = load_tokenizer(folder).encode("You are")
    _, wanted = alone(folder, ids)
    body = {"model": "agent", "max_tokens": 24, "temperature": 0}
    bodies = [{**body, "prompt": "You are"}, {**body, "prompt": [ids, ids]}]
    one, two = (a.json() for a in serve(folder, *bodies, path="/v1/completions"))
    texts = [choice["text"] for choice in one["choices"] + two["choices"]]
    assert texts == [wanted.text] * 3
    assert two["usage"]["prompt_tokens"] == 2 * len(ids)


def test_a_completion_that_asks_for_no_number_gets_16_tokens_or_what_fits(folder):
    ids = [[9] * n for n in (4, MAX_LENGTH - 5)]
    body = {"model": "agent", "prompt": ids, "temperature": 0}
    (answer,) = serve(folder, body, path="/v1/completions")
    wanted = [
        len(alone(folder, prompt, max_tokens=n)[1].ids)
        for prompt, n in zip(ids, (16, 5), strict=True)
    ]
    assert answer.json()["usage"]["completion_tokens"] == sum(wanted)
    (answer,) = serve(folder, body, path="/v1/completions", config=ServeConfig(max_new_tokens=2))
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("prompt", ["", [], [5, 10**6], [[5], []]])
def test_a_prompt_without_tokens_or_with_unknown_ones_is_400(folder, prompt):
    (answer,) = serve(folder, {"model": "agent", "prompt": prompt}, path="/v1/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("fields", [{"max_tokens": MAX_LENGTH}, {"max_completion_tokens": 155}])
def test_what_does_not_fit_is_context_length_exceeded(folder, fields):
    body = {"max_tokens": None} | fields
    (answer,) = serve(folder, ask("I go", **body))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("wanted", "num_prompt", "most", "given"),
    [
        (40, 60, None, 40),
        (1, 99, None, 1),
        (None, 60, None, 40),
        (None, 60, 7, 7),
        (None, 60, 50, 40),
    ],
)
def test_new_tokens_are_those_asked_for_or_what_fits(wanted, num_prompt, most, given):
    assert new_tokens(wanted, num_prompt, 100, most) == given


@pytest.mark.parametrize(("wanted", "num_prompt"), [(41, 60), (1, 100), (None, 100), (None, 101)])
def test_more_tokens_than_fit_are_refused(wanted, num_prompt):
    with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens"):
        new_tokens(wanted, num_prompt, 100)


def test_more_tokens_than_a_request_may_have_are_400(folder):
    config = ServeConfig(max_new_tokens=8)
    bodies = [ask("I go", max_tokens=9), ask("I go", max_tokens=8), ask("I go", max_tokens=None)]
    refused, *given = serve(folder, *bodies, config=config)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert max(answer.json()["usage"]["completion_tokens"] for answer in given) == 8


def test_a_full_queue_is_429_with_retry_after(folder):
    config = ServeConfig(max_batch_size=2)
    answers = serve(
        folder, *[ask("I go", max_tokens=100)] * 20, config=config, max_queued_requests=3
    )
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 15  # two in the batch and three that wait are answered
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}
    assert {answer.status_code for answer in answers} == {200, 429}


def test_an_answer_that_takes_too_long_is_504_and_frees_its_place(folder):
    async def send():
        config = ServeConfig(request_timeout_s=0.001)
        async with replica(folder, config=config) as (backend, client):
            answer = await client.post(CHAT, json=ask("I go", max_tokens=100))
            await until(lambda: backend._num_running() == backend._num_open() == 0)
            return answer

    answer = asyncio.run(send())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(folder, is_stream):
    async def send():
        async with replica(folder) as (backend, client):
            body = ask("I go", max_tokens=130, stream=is_stream)
            task = asyncio.create_task(client.post(CHAT, json=body))
            await until(lambda: backend._num_running() == 1)
            task.cancel()
            await until(lambda: backend._num_running() == backend._num_open() == 0)

    asyncio.run(send())


def test_a_stream_arrives_while_it_is_made_and_ends_where_the_client_hangs_up(folder):
    """The ASGI protocol by hand, because httpx collects a stream before it gives it."""

    async def send():
        async with replica(folder) as (backend, _):
            api = make_api(backend, backend._config, backend.counts)
            body = json.dumps(ask("I go", max_tokens=130, stream=True)).encode()
            scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
            scope |= {"query_string": b"", "http_version": "1.1", "asgi": {"spec_version": "2.3"}}
            scope["headers"] = [(b"content-type", b"application/json")]
            hung_up, parts, running = asyncio.Event(), [], []
            requests = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive():
                if (request := next(requests, None)) is not None:
                    return request
                await hung_up.wait()
                return {"type": "http.disconnect"}

            async def take(message):
                parts.append(message)
                running.append(backend._num_running())
                if len(parts) == 6:
                    hung_up.set()

            await api(scope, receive, take)
            await until(lambda: backend._num_running() == backend._num_open() == 0)
            return parts, running

    parts, running = asyncio.run(send())
    assert len(parts) < 60
    assert running[4] == 1  # the answer was still being made when this part came
    assert all(part["body"].endswith(b"\n\n") for part in parts[1:6])


def test_counts_show_requests_and_tokens(folder):
    async def send():
        async with replica(folder) as (_, client):
            for _ in range(2):
                answer = await client.post(CHAT, json=ask("I go"))
            return answer.json()["usage"], (await client.get("/metrics")).text

    usage, text = asyncio.run(send())
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == prompt - 1
    assert float(values['step_ray_prompt_tokens_total{replica="0"}']) == 2 * prompt
    assert float(values['step_ray_cached_tokens_total{replica="0"}']) == cached
    generated = 'step_ray_generated_tokens_total{replica="0"}'
    assert float(values[generated]) == 2 * usage["completion_tokens"]


def test_another_model_takes_over_and_the_old_one_answers_what_it_was_asked(folder):
    async def send():
        async with replica(folder) as (backend, client):
            task = asyncio.create_task(client.post(CHAT, json=ask("I go", max_tokens=100)))
            await until(lambda: backend._num_running() == 1)
            old = backend._loaded
            await backend.load(spec(folder, "next"))
            first = await task
            second = await client.post(CHAT, json=ask("I go", model="next"))
            gone = await client.post(CHAT, json=ask("I go"))
            await until(lambda: old.thread.has_ended)
            return [answer.status_code for answer in (first, second, gone)]

    assert asyncio.run(send()) == [200, 200, 404]


PAST = [
    {"thought": "I look.", "action": "look", "observation": "You see a desk."},
    {"text": "Action: go to desk 1", "observation": "Nothing happens."},
    {"text": "what?", "observation": FORMAT_NOTICE},
]


def test_the_prompt_of_a_step_is_that_of_the_episode_loop():
    steps = [
        Step(
            index=index,
            kind=StepKind.ACT,
            author=Author.STUDENT,
            text=text,
            thought="",
            action="",
            observation=turn["observation"],
        )
        for index, (turn, text) in enumerate(
            zip(PAST, ["Thought: I look.\nAction: look", PAST[1]["text"], "what?"], strict=True)
        )
    ]
    wanted = conversation(initial_messages("alfworld_short", "Find a mug."), steps)
    request = ActRequest(task="Find a mug.", history=PAST)
    assert act_messages(request, "alfworld_short") == wanted


def test_a_step_is_what_the_model_says_next(folder):
    first = [Message(role="system", content="Explore the house. Act.")]
    first.append(Message(role="user", content="A room."))
    _, wanted = alone(folder, first)
    body = {"task": "A room.", "prompt": "alfworld_explore", "max_tokens": 24}
    (answer,) = serve(folder, body, path=ACT)
    assert answer.json()["token_ids"] == list(wanted.ids)


def test_a_step_without_a_limit_gets_what_fits_up_to_the_servers(folder):
    body = {"task": "A room.", "prompt": "alfworld_explore"}  # 256 tokens would not fit
    (answer,) = serve(folder, body, path=ACT)
    assert answer.json()["usage"]["total_tokens"] <= MAX_LENGTH
    config = ServeConfig(agent=AgentConfig(max_new_tokens=5))
    (answer,) = serve(folder, body, path=ACT, config=config)
    assert answer.json()["usage"]["completion_tokens"] <= 5


def test_an_unknown_instruction_is_400(folder):
    (answer,) = serve(folder, {"task": "A room.", "prompt": "none_v1"}, path=ACT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


PLAY = {"environment": "alfworld", "split": "valid_seen", "count": 3, "max_steps": 2}
TINY = EnvConfig(prompt="alfworld_explore", generator=GeneratorConfig(size="tiny"))


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    """The tiny model that knows the household, and games for it."""
    agent = AgentConfig(
        envs={"alfworld": TINY},
        work_dir=str(tmp_path_factory.mktemp("work")),
        num_generated=4,
        max_new_tokens=32,
        max_episodes=5,
    )
    return ServeConfig(agent=agent)


def play(config, *bodies):
    folder = resolve_init("builtin:tiny-base")
    return serve(folder, *bodies, path=EPISODES, config=config, max_length=1024)


def records(answer):
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def test_episodes_are_played_to_their_end_and_reported(player):
    *episodes, report = records(play(player, PLAY)[0])
    played = [from_row(episode["trajectory"]) for episode in episodes]
    assert {len(one.steps) for one in played} <= {1, 2}
    assert {one.stop_reason for one in played} <= {StopReason.MAX_STEPS, StopReason.SUCCESS}
    assert {one.prompt[0].content for one in played} == {"Explore the house. Act."}
    assert sorted(one.models["student"] for one in played) == ["agent"] * 3
    assert (report["num_asked"], report["num_played"], report["num_missing"]) == (3, 3, 0)
    assert report["report"]["num_tasks"] == 3


def test_episodes_by_id_are_those_and_repeat_themselves(player):
    first = records(play(player, {**PLAY, "trajectories": False})[0])[:-1]
    ids = [episode["task_id"] for episode in first][:2]
    body = {**PLAY, "count": None, "ids": ids}
    again = records(play(player, body)[0])[:-1]
    assert sorted(episode["task_id"] for episode in again) == sorted(ids)
    steps = {e["task_id"]: [s["text"] for s in e["trajectory"]["steps"]] for e in again}
    once_more = records(play(player, body)[0])[:-1]
    assert {e["task_id"]: [s["text"] for s in e["trajectory"]["steps"]] for e in once_more} == steps
    assert "trajectory" not in first[0]


def test_longer_answers_than_the_model_has_room_for_end_the_episode_not_the_request(player):
    (episode, _) = records(play(player, {**PLAY, "count": 1, "max_tokens": 4096})[0])
    assert episode["stop_reason"] == "context_length"


def test_requests_that_come_together_list_the_tasks_once(player, monkeypatch):
    listed = []

    def list_tasks(config, split, original=episode_service._list_tasks):
        listed.append(split)
        return original(config, split)

    monkeypatch.setattr(episode_service, "_list_tasks", list_tasks)
    body = {**PLAY, "count": 1, "max_steps": 1}
    answers = play(player, *[body] * 4)
    assert [len(records(answer)) for answer in answers] == [2] * 4
    assert listed == ["valid_seen"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"environment": "chess"}, 400, "environment"),
        ({"split": "pretrain"}, 400, "split"),
        ({"count": 5}, 400, "count"),
        ({"count": None, "ids": ["alfworld/none"]}, 400, "ids"),
        ({"environment": "scienceworld", "split": "none"}, 400, "split"),
    ],
)
def test_episodes_that_no_server_could_play_are_400(player, fields, status, param):
    (answer,) = play(player, {**PLAY, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_an_environment_that_is_not_installed_is_501(player, monkeypatch):
    monkeypatch.setitem(REGISTRY, "webshop", "step_ray_no_such_package:Env")
    (answer,) = play(player, {**PLAY, "environment": "webshop", "split": "test"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (501, "environment_not_installed")
    assert "pip install 'step-ray[webshop]'" in error["message"]


def test_more_episodes_than_have_room_are_429(player):
    async def send():
        folder = resolve_init("builtin:tiny-base")
        async with replica(folder, config=player, max_length=1024) as (backend, client):
            first = asyncio.create_task(client.post(EPISODES, json=PLAY))
            await until(lambda: backend._episodes.num_open == 3)
            return await client.post(EPISODES, json=PLAY), await first

    refused, played = asyncio.run(send())
    assert (played.status_code, refused.status_code) == (200, 429)
    assert refused.headers["retry-after"] == "10"


def test_a_client_that_leaves_ends_its_episodes(player):
    async def send():
        folder = resolve_init("builtin:tiny-base")
        async with replica(folder, config=player, max_length=1024) as (backend, client):
            task = asyncio.create_task(client.post(EPISODES, json={**PLAY, "max_steps": 40}))
            await until(lambda: backend._num_running() > 0)
            task.cancel()
            await until(lambda: backend._num_running() == backend._num_open() == 0)
            return backend._episodes.num_open

    assert asyncio.run(send()) == 0


def test_episodes_that_are_not_over_in_time_are_reported_as_missing(player):
    agent = player.agent.model_copy(update={"timeout_s": 1e-6})
    (report,) = records(play(ServeConfig(agent=agent), PLAY)[0])
    assert (report["num_played"], report["num_missing"], report["report"]) == (0, 3, None)


def test_pickled_weights_are_refused_before_they_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.unlink()
    Path(tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    for look in (
        lambda: load_model(str(weights.parent), "float32"),
        lambda: check_model(str(weights.parent), load_tokenizer(str(weights.parent))),
    ):
        with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model.bin\)"):
            look()
