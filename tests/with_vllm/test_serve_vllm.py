"""The agent on vLLM behind Ray's OpenAI application, with a tiny random Llama on CPU.

`make test-vllm` makes the environment that this needs; elsewhere it is skipped.
"""

import json
import os

import httpx
import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

import ray
import torch
from peft import LoraConfig, get_peft_model

from step_ray.config import ScratchConfig, ServeConfig
from step_ray.render import Renderer
from step_ray.serve import deploy
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.training.student import (
    load_model,
    load_tokenizer,
    new_model,
    save_student,
    train_tokenizer,
)
from step_ray.types import Message

MAX_LENGTH = 512
KEY_ENV, KEY = "STEP_RAY_TEST_KEY", "sesame"
SHAPE = ScratchConfig(vocab_size=300, hidden_size=64, num_layers=2, num_heads=2)
TEXTS = [f"You are in room {i}. Go to desk {i}." for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that gives varied text."""
    tokenizer = train_tokenizer(["You are in the middle of a room."], SHAPE.vocab_size)
    model = new_model(tokenizer, SHAPE, max_length=MAX_LENGTH, seed=0)
    torch.manual_seed(0)
    for layer in model.model.layers:
        for weight in layer.self_attn.parameters():
            torch.nn.init.normal_(weight, std=0.4)
    path = tmp_path_factory.mktemp("model")
    save_student(path, model, tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter on that model, which changes what it says; as training exports it."""
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(load_model(folder, "float32"), settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    model.get_base_model().generation_config.save_pretrained(path)
    load_tokenizer(folder).save_pretrained(path)
    assert json.loads((path / "adapter_config.json").read_text())["r"] == 4
    return str(path)


@pytest.fixture(scope="module")
def cluster():
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ[KEY_ENV] = f"old-key, {KEY}"
    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=150 * 1024**2,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


CONFIG = ServeConfig(
    engine="vllm", port=0, max_batch_size=8, cpus_per_replica=1, api_key_env=KEY_ENV
)


@pytest.fixture(scope="module")
def endpoint(cluster, folder):
    served = deploy(folder, "agent", CONFIG, max_length=MAX_LENGTH, timeout_s=300)
    yield served
    served.close()


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=endpoint.base_url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client, text, **kwargs):
    messages = [{"role": "user", "content": text}]
    kwargs = {"max_tokens": 16, "temperature": 0} | kwargs
    return client.chat.completions.create(model="agent", messages=messages, **kwargs)


def check_greedy_texts(client, folder):
    """The server says what the model of a folder says without it."""
    tokenizer = load_tokenizer(folder)
    renderer = Renderer(tokenizer, MAX_LENGTH)
    prompts = [renderer.render_prompt([Message(role="user", content=text)]) for text in TEXTS]
    generator = BatchGenerator(load_model(folder, "float32"), tokenizer, max_length=MAX_LENGTH)
    wanted = generator.generate(prompts, [SamplingParams(max_tokens=16)] * len(TEXTS))
    got = [ask(client, text) for text in TEXTS]
    texts = [answer.choices[0].message.content for answer in got]
    # vLLM holds back a character that the limit cut in two; we show what there is of it
    assert [text.rstrip("\ufffd") for text in texts] == [
        one.text.rstrip("\ufffd") for one in wanted
    ]
    assert [answer.usage.prompt_tokens for answer in got] == [len(prompt) for prompt in prompts]
    return texts


def test_greedy_text_is_that_of_the_model_without_a_server(client, folder):
    check_greedy_texts(client, folder)


def test_a_stream_comes_in_pieces_that_make_the_same_text(client):
    whole = ask(client, "go").choices[0].message.content
    chunks = [c for c in ask(client, "go", stream=True) if c.choices]
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 1


def test_a_prompt_that_is_too_long_is_400(client):
    with pytest.raises(openai.BadRequestError, match=r"context length|longer than"):
        ask(client, "go to the desk. " * 400)


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])


def test_only_health_answers_without_a_key(endpoint):
    root = endpoint.base_url.removesuffix("/v1")
    assert httpx.get(f"{root}/health", timeout=30).status_code == 200
    for path in ("/v1/models", "/docs", "/tokenize"):
        assert httpx.get(root + path, timeout=30).status_code == 401
    wrong = httpx.post(
        f"{endpoint.base_url}/chat/completions",
        headers={"authorization": "Bearer wrong", "origin": "https://elsewhere.example"},
        json={"model": "agent", "messages": [{"role": "user", "content": "x"}]},
    )
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "access-control-allow-origin" not in wrong.headers


def test_an_adapter_is_served_on_its_base_under_one_name(endpoint, client, folder, adapter):
    whole = ask(client, TEXTS[0]).choices[0].message.content
    deploy(adapter, "agent", CONFIG, max_length=MAX_LENGTH, timeout_s=300)
    texts = check_greedy_texts(client, adapter)
    assert texts[0] != whole
    assert [model.id for model in client.models.list().data] == ["agent"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(
            model="agent-base", messages=[{"role": "user", "content": "x"}]
        )
