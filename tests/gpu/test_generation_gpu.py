"""The generation engine on a GPU: Hugging Face's greedy text, and draws that a seed decides."""

import random

import pytest
import torch

from step_ray.serving.generation import BatchGenerator, SamplingParams, choose_tokens
from tests.tiny_models import hf_greedy, new_writer, random_prompts, writer_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer():
    return writer_tokenizer()


@pytest.fixture
def model(tokenizer):
    return new_writer(tokenizer, MAX_LENGTH).to("cuda")


@pytest.mark.parametrize("record_steps", [True, False])
def test_turns_of_a_batch_with_reuse_are_those_of_hf_generate(model, tokenizer, record_steps):
    engine = BatchGenerator(
        model, tokenizer, max_length=MAX_LENGTH, prefix_cache_mb=64, record_steps=record_steps
    )
    batch, cached = random_prompts(5, 60, 1, 40), []
    for observation in random_prompts(9, 4, 12):
        got = engine.generate(batch, [SamplingParams(max_tokens=8)] * len(batch))
        assert [g.ids for g in got] == [hf_greedy(model, p, 8) for p in batch]
        cached.append(sum(g.cached_tokens for g in got))
        batch = [p + list(g.ids) + observation for p, g in zip(batch, got, strict=True)]
    assert 0 == cached[0] < cached[1] < cached[2]


def test_rows_that_come_and_go_are_those_of_hf_generate(model, tokenizer):
    engine = BatchGenerator(model, tokenizer, max_length=MAX_LENGTH, prefix_cache_mb=64)
    batch = random_prompts(40, 70, 3, 200, 1)
    sizes = [12, 3, 9, 40, 6]
    tickets, answers = [], {}
    for prompt, size in zip(batch, sizes, strict=True):
        tickets += engine.add([prompt], [SamplingParams(max_tokens=size)])
        for _ in range(2):
            answers.update(engine.step())
    while len(answers) < len(batch):
        answers.update(engine.step())
    got = [answers[ticket].ids for ticket in tickets]
    assert got == [hf_greedy(model, p, n) for p, n in zip(batch, sizes, strict=True)]
    engine.free()
    (again,) = engine.generate(batch[:1], [SamplingParams(max_tokens=12)])
    assert again.ids == got[0]


def test_a_seed_decides_a_draw_and_neighbours_do_not(model, tokenizer):
    engine = BatchGenerator(model, tokenizer, max_length=MAX_LENGTH, prefix_cache_mb=0)
    batch = random_prompts(20, 35, 7)
    params = [
        SamplingParams(max_tokens=10, temperature=1.0, seed=1),
        SamplingParams(max_tokens=4),
        SamplingParams(max_tokens=10, temperature=0.7, seed=2, top_p=0.9),
    ]
    together = engine.generate(batch, params)
    assert together == [engine.generate([p], [w])[0] for p, w in zip(batch, params, strict=True)]


def test_draws_on_the_device_are_those_on_the_cpu():
    torch.manual_seed(0)
    logits = torch.randn(64, 500) * 3
    params = [
        SamplingParams(max_tokens=1, temperature=0.5 + n / 64, top_p=1 - n / 100) for n in range(64)
    ]

    def drawn(device):
        return choose_tokens(logits.to(device), params, [random.Random(n) for n in range(64)])

    assert drawn("cuda") == drawn("cpu")
