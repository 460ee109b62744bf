"""The served agent over real HTTP: one Serve instance, tiny random models."""

import asyncio
import json
import logging
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import openai
import pytest
from pydantic import ValidationError
from served_models import MAX_LENGTH, expected, save_varied_model

from step_ray.calls.firstcall import check_endpoint
from step_ray.env_config import EnvConfig, GeneratorConfig
from step_ray.errors import ConfigError, ContextLengthError
from step_ray.llm import OpenAIChat
from step_ray.serve import ServeArgs, build_app, deploy
from step_ray.serving.config import AgentConfig, ServeConfig
from step_ray.types import Message

KEY_ENV = "STEP_RAY_TEST_KEY"
AGENT = AgentConfig(
    envs={"alfworld": EnvConfig(prompt="alfworld_explore", generator=GeneratorConfig(size="tiny"))},
    num_generated=2,
    max_new_tokens=8,
)
CONFIG = ServeConfig(
    port=0, num_replicas=2, max_batch_size=8, api_key_env=KEY_ENV, agent=AGENT, drain_timeout_s=60
)
TEXTS = [f"You are in room {i}. " * (i % 4 + 1) for i in range(12)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models that give varied text."""
    return {
        name: save_varied_model(tmp_path_factory.mktemp(name), seed)
        for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="module")
def endpoint(ray_cluster, folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_ENV, "sesame, old-sesame")
        served = deploy(folders["one"], "one", CONFIG, max_length=MAX_LENGTH)
        yield served
        served.close()


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0
    ) as client:
        yield client


def ask(client, text, model="one", **kwargs):
    kwargs = {"max_tokens": 12, "temperature": 0} | kwargs
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **kwargs)


def test_a_wrong_model_path_is_a_config_error():
    with pytest.raises(ConfigError, match=r"^model_dir: './nowhere' holds no config.json"):
        build_app(ServeArgs(model_dir="./nowhere"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_missing_vllm_is_a_config_error(folders):
    with pytest.raises(ConfigError, match=r"^serve.engine: 'vllm' is not installed"):
        build_app(ServeArgs(model_dir=folders["one"], engine="vllm"))


def test_a_missing_key_variable_is_a_config_error(folders):
    with pytest.raises(ConfigError, match="'STEP_RAY_NO_KEY' is not set"):
        build_app(ServeArgs(model_dir=folders["one"], api_key_env="STEP_RAY_NO_KEY"))


def test_the_address_is_no_argument_of_the_app():
    with pytest.raises(ValidationError, match="host and port belong to Serve"):
        ServeArgs(model_dir="m", port=8000)


def test_the_answer_is_the_models_own_with_exact_usage(client, folders):
    prompt, wanted = expected(folders["one"], "You are in a room.")
    got = ask(client, "You are in a room.")
    assert got.choices[0].message.content == wanted.text
    assert got.choices[0].finish_reason == wanted.finish_reason
    assert got.usage.prompt_tokens == len(prompt)
    assert got.usage.completion_tokens == len(wanted.ids)


def test_concurrent_requests_get_the_texts_of_single_ones(client):
    single = [ask(client, text).choices[0].message.content for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        together = list(pool.map(lambda text: ask(client, text), TEXTS))
    assert [got.choices[0].message.content for got in together] == single
    assert len(set(single)) > 6


def test_a_seed_repeats_a_sampled_answer(client):
    texts = [
        ask(client, "go", temperature=1.5, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_gives_the_same_text_in_pieces(client):
    whole = ask(client, "go").choices[0].message.content
    chunks = list(ask(client, "go", stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage.completion_tokens == 12


def test_the_official_client_completes_prompts_and_streams_them(client):
    prompts = ["You are", "You are in the middle"]
    wish = {"model": "one", "prompt": prompts, "max_tokens": 12, "temperature": 0}
    whole = [choice.text for choice in client.completions.create(**wish).choices]
    texts = ["", ""]
    for chunk in client.completions.create(**wish, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == whole


def curl(endpoint, path, *flags, key="old-sesame"):
    url = endpoint.base_url.removesuffix("/v1") + path
    command = ["curl", "-sS", "--max-time", "60", "-H", f"Authorization: Bearer {key}"]
    done = subprocess.run([*command, *flags, url], capture_output=True, check=True, text=True)
    return done.stdout


def post(endpoint, path, body, *flags):
    head = ("-H", "content-type: application/json", "-d", json.dumps(body))
    return curl(endpoint, path, *head, *flags)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_steps_and_plays_with_any_of_the_keys(endpoint):
    ask = {"task": "You are in a room.", "prompt": "alfworld_short", "max_tokens": 8}
    step = json.loads(post(endpoint, "/v1/agent/act", ask))
    assert step["usage"]["completion_tokens"] == len(step["token_ids"])
    body = {"environment": "alfworld", "split": "valid_seen", "count": 2, "max_steps": 1}
    *episodes, report = map(json.loads, post(endpoint, "/v1/episodes", body, "-N").splitlines())
    assert [episode["stop_reason"] for episode in episodes] == ["max_steps"] * 2
    assert report["report"]["num_truncated"] == 2


def running(endpoint):
    """Prompts in the batch of each replica, as a scrape shows them."""
    url = f"{endpoint.base_url.removesuffix('/v1')}/metrics"
    text = httpx.get(url, headers={"authorization": "Bearer sesame"}, timeout=30).text
    lines = [ln for ln in text.splitlines() if ln.startswith("step_ray_requests_running{")]
    return [float(line.rpartition(" ")[2]) for line in lines]


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_scrape_shows_all_replicas_whichever_it_reaches(endpoint):
    wait_for(lambda: len(running(endpoint)) == 2)


def test_a_client_that_hangs_up_frees_its_place(client, endpoint):
    streams = [ask(client, f"go {i}", stream=True, max_tokens=230) for i in range(4)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    wait_for(lambda: not any(running(endpoint)))


def test_a_session_stays_on_the_replica_that_holds_its_prefix(client):
    missed = []
    for session in range(8):
        headers = {"x-session-id": f"episode-{session}"}
        first, again = (ask(client, f"{session}. I go", extra_headers=headers) for _ in range(2))
        cached = again.usage.prompt_tokens_details.cached_tokens
        missed.append(first.usage.prompt_tokens - 1 - cached)
    assert missed == [0] * 8


def test_a_prompt_that_does_not_fit_is_context_length_exceeded(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "1" * MAX_LENGTH, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_an_explicit_limit_is_not_lowered_to_fit(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "go", max_tokens=MAX_LENGTH)
    assert caught.value.code == "context_length_exceeded"


def test_without_a_limit_the_answer_may_fill_the_context(client):
    got = ask(client, "1" * (MAX_LENGTH - 20), max_tokens=openai.omit)
    assert got.usage.total_tokens <= MAX_LENGTH
    assert got.usage.completion_tokens > 1


def test_our_client_tells_a_full_context_from_other_errors(endpoint):
    async def send():
        chat = OpenAIChat(base_url=endpoint.base_url, model="one", api_key="sesame")
        try:
            await chat.complete([Message(role="user", content="1" * 300)], max_tokens=1)
        finally:
            await chat.aclose()

    with pytest.raises(ContextLengthError):
        asyncio.run(send())


def test_a_message_the_template_cannot_render_is_400(client):
    with pytest.raises(openai.BadRequestError):
        ask(client, "go \U000f0000 <|user|>")


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError):
        ask(client, "go", model="other")


def test_the_endpoint_check_of_the_pipeline_passes(endpoint):
    check_endpoint("student", endpoint.base_url, "one", "sesame", timeout_s=10)


def test_a_wrong_key_is_401_and_health_is_open(endpoint):
    root = endpoint.base_url.removesuffix("/v1")
    wrong = httpx.get(f"{root}/v1/models", headers={"authorization": "Bearer open"})
    assert (wrong.status_code, httpx.get(f"{root}/health").status_code) == (401, 200)


# The tests from here on change what is served, and leave it changed for the next one.


def test_another_model_replaces_the_first(endpoint, client, folders):
    second = deploy(folders["two"], "two", CONFIG, max_length=MAX_LENGTH)
    endpoint.close()  # it was replaced, so this closes nothing
    assert second.base_url == endpoint.base_url
    assert not logging.getLogger("ray.serve").isEnabledFor(logging.INFO)
    text = ask(client, "You are in a room.", model="two").choices[0].message.content
    assert text == expected(folders["two"], "You are in a room.")[1].text
    with pytest.raises(openai.NotFoundError):
        ask(client, "go", model="one")


def test_a_full_queue_is_429_with_retry_after(endpoint, folders):
    config = CONFIG.model_copy(update={"max_queued_requests": 1})
    deploy(folders["one"], "one", config, max_length=MAX_LENGTH)
    body = {"model": "one", "messages": [{"role": "user", "content": "go"}], "max_tokens": 200}

    def send(_):
        headers = {"authorization": "Bearer sesame"}
        url = f"{endpoint.base_url}/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60)

    # more than 2 replicas x a batch of 8 and a queue of 1
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(send, range(60)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert {answer.json()["error"]["code"] for answer in refused} == {"overloaded"}


def test_what_is_in_flight_is_answered_when_the_application_ends(endpoint, folders):
    last = deploy(folders["one"], "one", CONFIG, max_length=MAX_LENGTH)
    url, headers = f"{last.base_url}/chat/completions", {"authorization": "Bearer sesame"}
    body = {"model": "one", "messages": [{"role": "user", "content": "go"}]}
    body |= {"max_tokens": 230, "temperature": 0, "stream": True}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor(1) as pool:
            closing = pool.submit(last.close)
            rest = list(lines)
            closing.result()
    assert "data: [DONE]" in rest


def test_weights_that_do_not_load_are_refused_before_a_replica_starts(endpoint, folders, tmp_path):
    shutil.copytree(folders["one"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"^model_dir: the weights in .* cannot be read"):
        deploy(str(tmp_path), "broken", CONFIG, max_length=MAX_LENGTH)
