"""The thread that generates, and the limits of a request; no Ray cluster, no HTTP."""

import asyncio
import threading

import pytest

from step_ray.agent_server import GenerationThread, to_params
from step_ray.config import ScratchConfig
from step_ray.generation import BatchGenerator, SamplingParams
from step_ray.openai_api import ApiError, ChatRequest
from step_ray.student import new_model, train_tokenizer

PARAMS = SamplingParams(max_tokens=6, temperature=1.0, seed=0)
PROMPTS = [[20 + i, 30, 40 + i] for i in range(7)]


def make_generator():
    tokenizer = train_tokenizer(["You are in a room."], 300)
    shape = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2)
    model = new_model(tokenizer, shape, max_length=64, seed=0)
    return BatchGenerator(model, tokenizer, max_length=64, prefix_cache_mb=0)


@pytest.fixture
def thread():
    thread = GenerationThread(make_generator(), max_batch_size=3, batch_wait_s=0.001, num_threads=1)
    yield thread
    thread.close()


def test_more_requests_than_rows_are_all_answered_as_alone(thread):
    async def send():
        return await asyncio.gather(*[thread.generate(p, PARAMS) for p in PROMPTS])

    assert asyncio.run(send()) == make_generator().generate(PROMPTS, [PARAMS] * len(PROMPTS))


def test_a_failure_reaches_the_caller_and_the_thread_goes_on(thread):
    with pytest.raises(ValueError, match="prompt is empty"):
        asyncio.run(thread.generate([], PARAMS))
    answer = asyncio.run(thread.generate(PROMPTS[0], PARAMS))
    assert len(answer.ids) == 6


def test_a_client_that_has_gone_leaves_the_others_their_answers(thread):
    async def send():
        tasks = [asyncio.create_task(thread.generate(p, PARAMS)) for p in PROMPTS]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *answers, gone = asyncio.run(send())
    assert [len(answer.ids) for answer in answers] == [6] * 6
    assert isinstance(gone, asyncio.CancelledError)


def test_a_closed_thread_answers_what_it_was_asked_and_ends():
    before = set(threading.enumerate())
    thread = GenerationThread(make_generator(), max_batch_size=3, batch_wait_s=0, num_threads=1)
    (started,) = set(threading.enumerate()) - before

    async def send():
        tasks = [asyncio.create_task(thread.generate(p, PARAMS)) for p in PROMPTS]
        await asyncio.sleep(0)
        thread.close()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(send())
    started.join(timeout=10)
    assert (len(answers), started.is_alive()) == (7, False)


def test_requests_count_as_open_until_they_are_answered_or_gone(thread):
    async def send():
        tasks = [asyncio.create_task(thread.generate(p, PARAMS)) for p in PROMPTS]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        during = thread.num_open
        await asyncio.gather(*tasks, return_exceptions=True)
        return during, thread.num_open

    assert asyncio.run(send()) == (7, 0)


def request(**fields):
    return ChatRequest(model="m", messages=[{"role": "user", "content": "go"}], **fields)


def test_defaults_are_openais():
    assert to_params(request(), 60, 100) == SamplingParams(
        max_tokens=40, temperature=1.0, top_p=1.0, seed=None, stop=()
    )


def test_all_sampling_fields_arrive():
    fields = {"temperature": 0, "top_p": 0.5, "seed": 3, "stop": "x"}
    assert to_params(request(max_completion_tokens=7, **fields), 60, 100) == SamplingParams(
        max_tokens=7, temperature=0, top_p=0.5, seed=3, stop=("x",)
    )


@pytest.mark.parametrize(("wanted", "num_prompt"), [(41, 60), (1, 100), (None, 100), (None, 101)])
def test_what_does_not_fit_is_context_length_exceeded(wanted, num_prompt):
    with pytest.raises(ApiError, match="maximum context length is 100 tokens") as caught:
        to_params(request(max_tokens=wanted), num_prompt, 100)
    assert (caught.value.status, caught.value.body["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )


@pytest.mark.parametrize(("wanted", "given"), [(40, 40), (1, 1), (None, 40)])
def test_what_just_fits_is_taken(wanted, given):
    assert to_params(request(max_tokens=wanted), 60, 100).max_tokens == given
