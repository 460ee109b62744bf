"""Batched generation: equal to Hugging Face greedy search, with and without reuse of prefixes."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from step_ray.errors import ConfigError, ContextLengthError
from step_ray.serving.decodegraph import DecodeGraphs
from step_ray.serving.generation import BatchGenerator, SamplingParams, choose_tokens
from step_ray.serving.kvcache import PrefixCache
from tests.tiny_models import WRITER, hf_greedy, new_writer, random_prompts, writer_tokenizer

MAX_LENGTH = 256


@pytest.fixture(scope="module")
def tokenizer():
    return writer_tokenizer()


@pytest.fixture
def model(tokenizer):
    return new_writer(tokenizer, MAX_LENGTH)


def make(model, tokenizer, *, prefix_cache_mb=0):
    return BatchGenerator(model, tokenizer, max_length=MAX_LENGTH, prefix_cache_mb=prefix_cache_mb)


def test_greedy_rows_of_unequal_length_equal_hf_generate(model, tokenizer):
    batch = random_prompts(5, 90, 1, 40, 41)
    sizes = [12, 3, 20, 12, 1]
    got = make(model, tokenizer).generate(batch, [SamplingParams(max_tokens=n) for n in sizes])
    assert [g.ids for g in got] == [
        hf_greedy(model, p, n) for p, n in zip(batch, sizes, strict=True)
    ]
    assert len(set(got[2].ids)) > 5


def test_a_model_whose_steps_cannot_be_recorded_is_computed_as_it_is(
    model, tokenizer, monkeypatch, caplog
):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(DecodeGraphs, "_record", refuse)
    engine = BatchGenerator(model, tokenizer, max_length=MAX_LENGTH, record_steps=True)
    batch = random_prompts(5, 90, 1)
    got = engine.generate(batch, [SamplingParams(max_tokens=6)] * 3)
    assert [g.ids for g in got] == [hf_greedy(model, p, 6) for p in batch]
    engine.free()
    assert caplog.messages == [
        "decode steps of this model are not recorded, so slower:"
        " operation not permitted when stream is capturing"
    ]


def test_the_next_turns_reuse_what_was_computed_and_change_nothing(model, tokenizer):
    cached = make(model, tokenizer, prefix_cache_mb=64)
    plain = make(model, tokenizer)
    params = [SamplingParams(max_tokens=8)] * 3
    batch, reused = random_prompts(30, 50, 31), []
    for observation in random_prompts(9, 4, 12):
        got, wanted = cached.generate(batch, params), plain.generate(batch, params)
        assert [g.ids for g in got] == [w.ids for w in wanted]
        reused.append([g.cached_tokens for g in got])
        batch = [p + list(g.ids) + observation for p, g in zip(batch, got, strict=True)]
    # the last new token of a turn was never fed, so 8 - 1 of its tokens are known
    assert reused == [[0, 0, 0], [37, 57, 38], [54, 74, 55]]


def test_a_prompt_that_departs_from_the_past_reuses_the_common_part_only(model, tokenizer):
    cached = make(model, tokenizer, prefix_cache_mb=64)
    (past,) = random_prompts(60)
    params = [SamplingParams(max_tokens=6)]
    cached.generate([past], params)
    other = [*past[:20], past[20] + 1, *past[21:50]]
    (got,) = cached.generate([other], params)
    assert got.cached_tokens == 20
    assert got.ids == hf_greedy(model, other, 6)


def test_a_repeated_prompt_computes_its_last_token_again(model, tokenizer):
    cached = make(model, tokenizer, prefix_cache_mb=64)
    batch, params = random_prompts(25), [SamplingParams(max_tokens=5)]
    (first,), (second,) = cached.generate(batch, params), cached.generate(batch, params)
    assert (first.cached_tokens, second.cached_tokens) == (0, 24)
    assert first.ids == second.ids


def test_a_sampled_row_does_not_depend_on_its_neighbours(model, tokenizer):
    engine = make(model, tokenizer)
    batch = random_prompts(20, 35, 7)
    params = [
        SamplingParams(max_tokens=10, temperature=1.0, seed=1),
        SamplingParams(max_tokens=4),
        SamplingParams(max_tokens=10, temperature=0.7, seed=2, top_p=0.9),
    ]
    together = engine.generate(batch, params)
    alone = [engine.generate([p], [w])[0] for p, w in zip(batch, params, strict=True)]
    assert together == alone


def test_the_seed_decides_a_sampled_row(model, tokenizer):
    engine = make(model, tokenizer)
    (prompt,) = random_prompts(20)
    wishes = [SamplingParams(max_tokens=12, temperature=2.0, seed=seed) for seed in (5, 5, 6)]
    one, same, other = engine.generate([prompt] * 3, wishes)
    assert one == same
    assert one.ids != other.ids


def test_a_prompt_may_join_while_others_run(model, tokenizer):
    engine = make(model, tokenizer, prefix_cache_mb=64)
    long, late, last = random_prompts(40, 70, 3)
    (first,) = engine.add([long], [SamplingParams(max_tokens=12)])
    answers = [engine.step() for _ in range(5)]
    second, third = engine.add([late, last], [SamplingParams(max_tokens=n) for n in (3, 9)])
    answers += [engine.step() for _ in range(9)]
    ended = {ticket: i for i, done in enumerate(answers) for ticket, _ in done}
    assert ended == {first: 11, second: 7, third: 13}
    got = {ticket: answer.ids for done in answers for ticket, answer in done}
    assert got == {
        first: hf_greedy(model, long, 12),
        second: hf_greedy(model, late, 3),
        third: hf_greedy(model, last, 9),
    }


def test_an_end_token_of_the_generation_config_ends_a_row(model, tokenizer):
    (prompt,) = random_prompts(20)
    free = hf_greedy(model, prompt, 10)
    end = next(t for t in free if t not in free[:1])
    position = free.index(end)
    model.generation_config.eos_token_id = [end]
    (got,) = make(model, tokenizer).generate([prompt], [SamplingParams(max_tokens=10)])
    assert got.ids == free[: position + 1]
    assert got.finish_reason == "stop"


def test_a_row_that_ignores_the_end_has_its_full_length(model, tokenizer):
    (prompt,) = random_prompts(9)
    whole = hf_greedy(model, prompt, 12)
    model.generation_config.eos_token_id = whole[4]
    wish = SamplingParams(max_tokens=12, ignore_eos=True)
    (got,) = make(model, tokenizer).generate([prompt], [wish])
    assert (got.ids, got.finish_reason) == (whole, "length")


def test_special_tokens_are_not_in_the_text(model, tokenizer):
    with torch.no_grad():  # the end-of-turn token wins everywhere
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(WRITER.hidden_size, len(tokenizer), bias=True)
        model.lm_head.bias[tokenizer.eos_token_id] = 100.0
    (got,) = make(model, tokenizer).generate(random_prompts(4), [SamplingParams(max_tokens=3)])
    assert (got.ids, got.text, got.finish_reason) == ((tokenizer.eos_token_id,), "", "stop")


def test_a_stop_text_ends_a_row_and_is_cut_off(model, tokenizer):
    (prompt,) = random_prompts(20)
    engine = make(model, tokenizer)
    (free,) = engine.generate([prompt], [SamplingParams(max_tokens=12)])
    stop = free.text[4:6]
    (got,) = engine.generate([prompt], [SamplingParams(max_tokens=12, stop=("\0\0", stop))])
    assert got.text == free.text[: free.text.index(stop)]
    assert got.finish_reason == "stop"
    assert got.ids == free.ids[: len(got.ids)]
    assert len(got.ids) < 12


def test_the_context_ends_a_row_with_length(model, tokenizer):
    batch = random_prompts(MAX_LENGTH - 3)
    (got,) = make(model, tokenizer).generate(batch, [SamplingParams(max_tokens=10)])
    assert (len(got.ids), got.finish_reason) == (3, "length")


def test_a_prompt_without_room_is_refused(model, tokenizer):
    with pytest.raises(ContextLengthError, match="256 tokens and leaves no room in 256"):
        make(model, tokenizer).generate(random_prompts(MAX_LENGTH), [SamplingParams(max_tokens=1)])


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="prompt is empty"):
        make(model, tokenizer).generate([[]], [SamplingParams(max_tokens=1)])


def test_no_prompts_give_no_answers(model, tokenizer):
    assert make(model, tokenizer).generate([], []) == []


def test_a_sliding_window_model_is_refused(tokenizer):
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    with pytest.raises(ConfigError, match="full-attention models only"):
        make(MistralForCausalLM(config), tokenizer)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(2000, 1)
    wishes = [SamplingParams(max_tokens=1, temperature=1.0)] * 2000
    drawn = choose_tokens(logits, wishes, [random.Random(i) for i in range(2000)])
    shares = [drawn.count(token) / 2000 for token in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.0, {1}), (0.4, {1}), (0.51, {1, 2}), (0.8, {1, 2}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, allowed):
    logits = torch.tensor([[0.125, 0.5, 0.375]]).log().repeat(200, 1)
    wishes = [SamplingParams(max_tokens=1, temperature=1.0, top_p=top_p)] * 200
    assert set(choose_tokens(logits, wishes, [random.Random(i) for i in range(200)])) == allowed


def state(length):
    """One layer with 4 bytes per token in keys and in values."""
    return [(torch.zeros(1, length, 1), torch.zeros(1, length, 1))]


def test_the_least_recently_used_prefix_goes_first():
    cache = PrefixCache(max_bytes=8 * 6)
    cache.add([1, 1], state(2))
    cache.add([2, 2], state(2))
    cache.add([3, 3], state(2))
    assert cache.longest([1, 1, 9])[0] == 2
    cache.add([4, 4], state(2))
    found = [cache.longest([i, i])[0] for i in (1, 2, 3, 4)]
    assert (found, cache.num_bytes) == ([2, 0, 2, 2], 48)


def test_a_continued_prefix_is_kept_once():
    cache = PrefixCache(max_bytes=1000)
    cache.add([1, 2], state(2))
    cache.add([1, 2, 3], state(3))
    assert (len(cache), cache.num_bytes, cache.longest([1, 2, 4])[0]) == (1, 24, 2)


IDS = st.lists(st.integers(0, 2), max_size=6)


@given(remembered=st.lists(IDS, max_size=5), ids=IDS)
def test_the_longest_common_prefix_is_found(remembered, ids):
    cache = PrefixCache(max_bytes=10**6)
    for past in remembered:
        cache.add(past, state(len(past)))
    lengths = [
        max(n for n in range(len(ids) + 1) if ids[:n] == past[:n]) for past in [*remembered, []]
    ]
    length, layers = cache.longest(ids)
    assert length == max(lengths)
    assert all(keys.shape[1] >= length for keys, _ in layers)


def test_pieces_of_a_row_are_the_beginning_of_its_text(model, tokenizer):
    generator = make(model, tokenizer)
    wishes = [SamplingParams(max_tokens=n, temperature=1.0, seed=n) for n in (12, 20)]
    tickets = generator.add(random_prompts(5, 9), wishes)
    shown, answers = dict.fromkeys(tickets, ""), {}
    while len(answers) < 2:
        answers.update(generator.step())
        for ticket, piece in generator.new_text(tickets):
            shown[ticket] += piece
    texts = [answers[ticket].text for ticket in tickets]
    assert texts == [g.text for g in make(model, tokenizer).generate(random_prompts(5, 9), wishes)]
    for ticket, text in zip(tickets, texts, strict=True):
        assert shown[ticket]
        assert text.startswith(shown[ticket])


def test_dropped_rows_leave_the_others_their_answers(model, tokenizer):
    generator = make(model, tokenizer, prefix_cache_mb=64)
    params = [SamplingParams(max_tokens=10)] * 4
    batch = random_prompts(20, 7, 30, 11)
    tickets = generator.add(batch, params)
    generator.step()
    generator.drop({tickets[0], tickets[3]})
    answers = {}
    while len(answers) < 2:
        answers.update(generator.step())
    wanted = make(model, tokenizer).generate(batch[1:3], params[1:3])
    assert [answers[ticket].ids for ticket in tickets[1:3]] == [w.ids for w in wanted]
    (again,) = generator.generate([batch[0]], params[:1])
    assert again.cached_tokens == 19  # what was computed for a dropped row is not lost
