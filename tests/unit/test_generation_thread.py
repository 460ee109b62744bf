"""The thread that generates for callers on an event loop."""

import asyncio
import threading
import time

import pytest

from step_ray.config import ScratchConfig
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.serving.generation_thread import GenerationThread
from step_ray.training.student import new_model, train_tokenizer

PARAMS = SamplingParams(max_tokens=6, temperature=1.0, seed=0)
PROMPTS = [[20 + i, 30, 40 + i] for i in range(7)]


def make_generator(prefix_cache_mb=0):
    tokenizer = train_tokenizer(["You are in a room."], 300)
    shape = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2)
    model = new_model(tokenizer, shape, max_length=64, seed=0)
    return BatchGenerator(model, tokenizer, max_length=64, prefix_cache_mb=prefix_cache_mb)


@pytest.fixture
def thread():
    thread = GenerationThread(make_generator(), max_batch_size=3, batch_wait_s=0.001, num_threads=1)
    yield thread
    thread.close()
    while not thread.has_ended:  # torch must not be at work when the interpreter ends
        time.sleep(0.001)


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


def test_a_closed_thread_lets_go_of_past_prompts_and_of_its_batch():
    generator = make_generator(prefix_cache_mb=16)
    thread = GenerationThread(generator, max_batch_size=3, batch_wait_s=0.001, num_threads=1)
    asyncio.run(thread.generate(PROMPTS[0], PARAMS))
    assert len(generator._prefixes) == 1
    assert generator._cache.width > 0
    thread.close()
    while not thread.has_ended:
        time.sleep(0.001)
    assert (len(generator._prefixes), generator._prefixes.num_bytes) == (0, 0)
    assert generator._cache.width == 0
    assert generator.generate(PROMPTS[:1], [PARAMS])  # what was let go is made anew


def test_requests_count_as_open_until_they_are_answered_or_gone(thread):
    async def send():
        tasks = [asyncio.create_task(thread.generate(p, PARAMS)) for p in PROMPTS]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        during = thread.num_open
        await asyncio.gather(*tasks, return_exceptions=True)
        return during, thread.num_open

    assert asyncio.run(send()) == (7, 0)


def test_pieces_make_up_the_answer(thread):
    async def follow(prompt):
        pending = thread.submit(prompt, PARAMS, in_pieces=True)
        return [piece async for piece in pending.pieces()], (await pending.result()).text

    async def send():
        return await asyncio.gather(*[follow(prompt) for prompt in PROMPTS])

    for pieces, text in asyncio.run(send()):
        assert "".join(pieces) == text
        assert len(pieces) > 1


LONG = SamplingParams(max_tokens=60, temperature=1.0, seed=0)


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.001)


def test_a_reader_that_stops_early_frees_its_place(thread):
    async def send():
        rows = [thread.submit(prompt, LONG, in_pieces=True) for prompt in PROMPTS[:3]]
        for row in rows:
            pieces = row.pieces()
            await anext(pieces)
            await pieces.aclose()
        await until(lambda: thread.num_running == thread.num_open == 0)
        return await thread.generate(PROMPTS[3], PARAMS)

    assert len(asyncio.run(send()).ids) == 6


def test_an_answer_that_takes_too_long_is_a_timeout_and_leaves_the_batch(thread):
    async def send():
        pending = thread.submit(PROMPTS[0], LONG, timeout_s=0.001)
        with pytest.raises(TimeoutError):
            await pending.result()
        pieces = thread.submit(PROMPTS[0], LONG, in_pieces=True, timeout_s=0.001).pieces()
        with pytest.raises(TimeoutError):
            async for _ in pieces:
                pass
        await until(lambda: thread.num_running == thread.num_open == 0)

    asyncio.run(send())


def test_a_thread_that_is_closed_while_its_only_caller_leaves_ends(thread):
    async def send():
        pending = thread.submit(PROMPTS[0], LONG)
        await until(lambda: thread.num_running == 1)
        thread.close()
        pending.cancel()
        await until(lambda: thread.has_ended)

    asyncio.run(send())


def test_a_failure_ends_the_pieces_too(thread):
    async def send():
        pending = thread.submit([], PARAMS, in_pieces=True)
        assert [piece async for piece in pending.pieces()] == []
        await pending.result()

    with pytest.raises(ValueError, match="prompt is empty"):
        asyncio.run(send())


def test_a_loop_that_is_gone_leaves_the_thread_alive(thread):
    async def leave():
        thread.submit(PROMPTS[0], LONG)

    asyncio.run(leave())
    assert len(asyncio.run(thread.generate(PROMPTS[1], PARAMS)).ids) == 6
