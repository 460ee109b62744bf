"""The agent on vLLM behind Ray's OpenAI application, with a tiny random Llama on CPU.

`make test-vllm` makes the environment that this needs; elsewhere it is skipped.
"""

import os

import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

import ray
import torch

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
def endpoint(folder):
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=150 * 1024**2,
        log_to_driver=False,
    )
    config = ServeConfig(engine="vllm", port=0, max_batch_size=8, cpus_per_replica=1)
    served = deploy(folder, "agent", config, max_length=MAX_LENGTH, timeout_s=300)
    yield served
    served.close()
    ray.shutdown()


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=endpoint.base_url, api_key="none", max_retries=0) as client:
        yield client


def ask(client, text, **kwargs):
    messages = [{"role": "user", "content": text}]
    kwargs = {"max_tokens": 16, "temperature": 0} | kwargs
    return client.chat.completions.create(model="agent", messages=messages, **kwargs)


def test_greedy_text_is_that_of_the_model_without_a_server(client, folder):
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
