"""Rendering: the prefix rule, special-token text, and templates that cannot be masked."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from step_ray.errors import ConfigError, DataError, TemplateError
from step_ray.render import Renderer, Span
from step_ray.training.student import train_tokenizer
from step_ray.types import Message

CORPUS = [
    "Thought: I need a mug.\nAction: go to desk 1",
    "On the desk 1, you see a mug 2.\n\nNothing happens. <tag> | end",
] * 3
SPECIALS = ("<|end|>", "<|user|>", "<|bos|>", "<s>", "</s>", "<|assistant|>")
THINK_STRIPPING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPEN_ENDED_PROMPT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING_PROMPT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
)
STRIPPING_ALL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].replace('<|end|>', '') }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "<s>[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n"
    "{% endif %}{{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}"
)


def byte_level(template=None):
    tokenizer = train_tokenizer(CORPUS, 330)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def sentence_piece_like():
    """BPE over a blank-marking pre-tokenizer, a BOS of its own, and the Llama 2 template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["[INST] <<SYS>> <</SYS>> [/INST]", *CORPUS], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # The bytes are ordinary tokens.
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=LLAMA2,
    )


def renderer(template=None):
    return Renderer(byte_level(template), 4096)


RENDERERS = {"byte_level": renderer(), "llama2": Renderer(sentence_piece_like(), 4096)}

any_text = st.lists(
    st.one_of(st.sampled_from([*SPECIALS, " ", "\n", "Action: go"]), st.text(max_size=8)),
    max_size=5,
).map("".join)
texts = any_text.filter(lambda text: all(ord(char) < 0xF0000 for char in text))


def message(role, content):
    return Message(role=role, content=content)


def conversation(*contents):
    roles = ["system", *(["user", "assistant"] * len(contents))]
    return [message(role, content) for role, content in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("name", RENDERERS)
@given(contents=st.lists(texts, min_size=5, max_size=5))
def test_the_prompt_of_every_trained_turn_is_a_token_prefix(name, contents):
    subject = RENDERERS[name]
    messages = conversation(*contents)

    rendered = subject.render_example(messages, [Span(message=2), Span(message=4)])

    for index in (2, 4):
        prompt = subject.render_prompt(messages[:index])
        assert list(rendered.input_ids[: len(prompt)]) == prompt
        assert not rendered.loss_mask[len(prompt) - 1]
        assert rendered.loss_mask[len(prompt)]
    assert rendered.loss_mask[-1]
    assert rendered.input_ids[-1] == subject.tokenizer.eos_token_id


@pytest.mark.parametrize("name", RENDERERS)
@given(contents=st.lists(texts, min_size=5, max_size=5), data=st.data())
def test_the_tokens_of_a_prefix_are_those_that_encoding_it_alone_gives(name, contents, data):
    subject = RENDERERS[name]
    whole = subject._chat(conversation(*contents), generation=False)
    part = whole[: data.draw(st.integers(1, len(whole.text)))]
    encoder = subject._encoder
    tokens, alone = encoder.encode(whole), encoder.encode(part).ids

    expected = len(alone) if tokens.ids[: len(alone)] == alone else None
    assert encoder.prefix_length(part, whole, tokens) == expected


@given(contents=st.lists(texts, min_size=5, max_size=5))
def test_no_text_in_a_message_becomes_a_special_token(contents):
    subject = RENDERERS["byte_level"]

    rendered = subject.render_example(conversation(*contents), [])

    ids = set(subject.tokenizer.all_special_ids)
    special = [t for t in rendered.input_ids if t in ids]
    expected = "<|bos|><|system|><|end|><|user|><|end|><|assistant|><|end|>"
    expected += "<|user|><|end|><|assistant|><|end|>"
    assert subject.tokenizer.decode(special) == expected


@given(contents=st.lists(texts, min_size=3, max_size=3))
def test_the_text_survives_rendering_word_for_word(contents):
    subject = RENDERERS["byte_level"]

    rendered = subject.render_example(conversation(*contents), [Span(message=2)])

    trained = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    text = subject.tokenizer.decode([token for token, mask in trained if mask])
    assert text == contents[2] + "<|end|>"


@pytest.mark.parametrize("name", RENDERERS)
@given(contents=st.lists(texts, min_size=3, max_size=3))
def test_the_second_encoder_agrees_with_the_first_where_nothing_is_to_be_kept(name, contents):
    subject = RENDERERS[name]
    harmless = [text.replace("<", "").replace(">", "") for text in contents]
    chat = subject._chat(conversation(*harmless), generation=False)

    forced = subject._encoder._encode_renamed(chat)

    assert forced == subject._encoder.encode(chat)


@given(content=texts, data=st.data())
def test_spans_inside_a_message_split_its_tokens_at_that_character(content, data):
    subject = RENDERERS["byte_level"]
    cut = data.draw(st.integers(0, len(content)))
    messages = conversation("rules", "room", content)

    rendered = subject.render_example(
        messages,
        trained=[Span(message=2, start=cut)],
        masked=[Span(message=2, stop=cut)] if cut else [],
    )

    def text(mask):
        chosen = zip(rendered.input_ids, mask, strict=True)
        return subject.tokenizer.decode([token for token, take in chosen if take])

    # A token over the cut belongs to neither side, so each side may lose some of its edge.
    assert not any(a and b for a, b in zip(rendered.loss_mask, rendered.error_mask, strict=True))
    assert (content[cut:] + "<|end|>").endswith(text(rendered.loss_mask))
    assert content[:cut].startswith(text(rendered.error_mask))


def test_a_cut_after_a_newline_loses_no_token():
    subject = RENDERERS["byte_level"]
    messages = conversation("rules", "room", "Action: go\nThought: I need a mug")

    rendered = subject.render_example(
        messages, [Span(message=2, start=10)], [Span(message=2, stop=10)]
    )

    prompt = subject.render_prompt(messages[:2])
    agent = [a or b for a, b in zip(rendered.loss_mask, rendered.error_mask, strict=True)]
    assert agent == [False] * len(prompt) + [True] * (len(agent) - len(prompt))


def test_a_post_processor_that_trims_offsets_moves_no_cut():
    tokenizer = byte_level()
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = conversation("rules", "room", "Action: go desk")  # " desk" is one token.
    spans = [Span(message=2, start=11)], [Span(message=2, stop=11)]

    assert Renderer(tokenizer, 4096).render_example(messages, *spans) == renderer().render_example(
        messages, *spans
    )


def test_an_ordinary_prompt_is_what_transformers_makes_of_it():
    tokenizer = byte_level()
    messages = conversation("rules", "On the desk 1, you see é mug 2.")

    ours = Renderer(tokenizer, 4096).render_prompt(messages)

    theirs = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ours == theirs


def test_the_bos_token_is_not_doubled_by_a_tokenizer_that_adds_one():
    tokenizer = sentence_piece_like()
    tokenizer._tokenizer.post_processor = _bos_adder(tokenizer)
    assert tokenizer("mug").input_ids[0] == tokenizer.bos_token_id

    ids = Renderer(tokenizer, 4096).render_prompt(conversation("rules", "room"))

    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def _bos_adder(tokenizer):
    return processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )


def test_truncation_saved_with_a_tokenizer_cuts_nothing():
    tokenizer = byte_level()
    tokenizer._tokenizer.enable_truncation(5)

    assert len(Renderer(tokenizer, 4096).render_prompt(conversation("rules", "a b c d e f"))) > 5


def test_a_template_that_strips_earlier_thoughts_is_refused_with_the_message_and_the_remedy():
    messages = conversation("rules", "room", "<think>mug?</think>go", "desk", "take")

    with pytest.raises(TemplateError, match=r"message 2 .*once later messages.*; use a template"):
        renderer(THINK_STRIPPING).render_example(messages, [Span(message=2), Span(message=4)])


def test_a_think_stripping_template_is_fine_when_only_the_last_turn_is_trained():
    messages = conversation("rules", "room", "<think>mug?</think>go", "desk", "take")

    rendered = renderer(THINK_STRIPPING).render_example(messages, [Span(message=4)])

    assert sum(rendered.loss_mask) >= 2


def test_a_generation_prompt_that_merges_with_the_answer_is_refused():
    # "assistant: " ends in a blank, which the word after it would take along.
    messages = conversation("rules", "room", "mug")

    with pytest.raises(TemplateError, match=r"message 2 .*tokens of its prompt"):
        renderer(OPEN_ENDED_PROMPT).render_example(messages, [Span(message=2)])


def test_a_generation_prompt_that_opens_a_thought_is_refused():
    messages = conversation("rules", "room", "Action: go")

    with pytest.raises(TemplateError, match=r"message 2 .*tokens of its prompt"):
        renderer(THINKING_PROMPT).render_example(messages, [Span(message=2)])


def test_a_template_that_refuses_a_role_is_a_template_error():
    with pytest.raises(TemplateError, match="no system"):
        renderer(REFUSING).render_prompt(conversation("rules", "room"))


def test_a_template_that_edits_special_text_in_contents_is_refused():
    with pytest.raises(TemplateError, match="inside message contents"):
        renderer(STRIPPING_ALL).render_prompt(conversation("rules", "a <|end|> b"))


def test_a_template_that_strips_a_cut_is_refused():
    stripping = THINKING_PROMPT.replace("m['content']", "m['content'].strip()").replace(
        "<think>", ""
    )
    messages = conversation("rules", "room", "go \n")

    with pytest.raises(TemplateError, match="word for word"):
        renderer(stripping).render_example(messages, [Span(message=2, start=3)])


def test_private_use_characters_matter_only_where_something_must_be_kept_apart():
    subject = renderer()

    assert subject.render_prompt(conversation("rules", "\U000f0003"))
    with pytest.raises(DataError, match=r"U\+F0003"):
        subject.render_prompt(conversation("rules", "\U000f0003 <|end|>"))


def test_a_tokenizer_that_can_only_spell_the_special_token_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "END": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="END",
        chat_template="{% for m in messages %}{{ m['content'] }} END {% endfor %}",
    )

    with pytest.raises(TemplateError, match="no ordinary tokens"):
        Renderer(fast, 64).render_prompt([message("user", "a END")])


def test_the_longest_special_token_wins_as_in_the_tokenizer():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>x", "<|user|>"]})

    subject = Renderer(tokenizer, 4096)

    assert subject._encoder.specials.findall("<|end|>xy<|end|>") == ["<|end|>x", "<|end|>"]


def test_only_an_assistant_message_can_be_trained():
    with pytest.raises(AssertionError, match="message 1"):
        renderer().render_example(conversation("rules", "room", "go"), [Span(message=1)])


def test_a_renderer_pickles_for_a_serve_replica():
    subject = renderer()
    messages = conversation("rules", "a <|end|> b")

    copy = pickle.loads(pickle.dumps(subject))

    assert copy.render_prompt(messages) == subject.render_prompt(messages)


def test_a_tokenizer_without_a_chat_template_is_a_config_error():
    tokenizer = byte_level()
    tokenizer.chat_template = None

    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(tokenizer, 64)
