"""Every chat format with every kind of tokenizer, against a plain spec of the format.

What is asked of each: the ids are those of its pieces encoded one by one, exactly the agent's turns
with their end-of-turn tokens are trained, and where a token would span a prompt and its answer the
conversation is refused.
"""

import pytest
import torch
from chat_formats import BACKENDS, FORMATS, QWEN3, Merged, expected, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.config import ScratchConfig
from step_ray.errors import ConfigError, TemplateError
from step_ray.render import Renderer, Span, check_chat
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.training.chat_template import ChatSettings, effective_template
from step_ray.training.student import load_tokenizer, new_model, save_student
from step_ray.training.turnend import end_of_turn, stop_ids
from step_ray.types import Message

PAIRS = [(name, kind) for name in FORMATS for kind in BACKENDS]
USUAL = [(name, kind) for name, form in FORMATS.items() for kind in form.kinds]
FOLD = ChatSettings(system="fold")


def tokenizer_of(name, kind):
    """With the system text folded, for the formats that need it."""
    form = FORMATS[name]
    template = effective_template(form.template, FOLD) if form.folds else form.template
    return make_tokenizer(name, kind, template)


RENDERERS = {pair: Renderer(tokenizer_of(*pair), 10_000) for pair in PAIRS}

CONTROLS = sorted({text for form in FORMATS.values() for text in form.controls})
WORDS = ["Thought: I need a mug.\n", "Action: go to desk 1", " ", "\n", "  ", "\n\n", "é"]
WORDS += ["e\u0301", "🙂", "👩\u200d🚀", "<<SYS>>", "[INST] ", " [/INST]", "<think>\n</think>"]
WORDS += [")", ">", "|", "好"]
hostile = st.lists(
    st.one_of(st.sampled_from(WORDS), st.sampled_from(CONTROLS), st.text(max_size=4)), max_size=5
).map("".join)
texts = hostile.filter(lambda text: all(ord(char) < 0xE000 or char in "🙂👩🚀" for char in text))


def conversation(contents, system):
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    return [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]


def turns(messages):
    return [Span(message=i) for i, m in enumerate(messages) if m.role == "assistant"]


def outcome(name, kind, messages):
    """What the spec says: ids and flags, or None where a token would span prompt and answer."""
    try:
        ids, flags = expected(name, kind, messages)
    except Merged:
        return None
    return tuple(ids), tuple(flags)


def rendered(name, kind, messages):
    try:
        got = RENDERERS[name, kind].render_example(messages, turns(messages))
    except TemplateError as exc:
        assert "tokens of its prompt" in str(exc)
        return None
    return got.input_ids, got.loss_mask


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@settings(max_examples=20)
@given(contents=st.lists(texts, min_size=5, max_size=5), system=st.booleans())
def test_ids_and_mask_are_those_of_the_format_piece_by_piece(name, kind, contents, system):
    messages = conversation(contents if system else contents[:4], system)

    assert rendered(name, kind, messages) == outcome(name, kind, messages)


def ordinary(name):
    contents = ["Rules.", "On the desk 1, you see a mug 2.", "Action: go to desk 1"]
    contents += ["Nothing happens.", "Thought: I need a mug.\nAction: go to desk 1"]
    return conversation(contents, system=True)


@pytest.mark.parametrize(("name", "kind"), USUAL)
def test_ordinary_text_is_rendered_and_not_refused(name, kind):
    messages = ordinary(name)

    assert rendered(name, kind, messages) == outcome(name, kind, messages) is not None


@pytest.mark.parametrize(("name", "kind"), USUAL)
def test_the_trained_tokens_read_as_the_answers_with_their_ends(name, kind):
    messages = ordinary(name)
    got = RENDERERS[name, kind].render_example(messages, turns(messages))
    trained = [i for i, flag in zip(got.input_ids, got.loss_mask, strict=True) if flag]

    text = RENDERERS[name, kind].tokenizer.decode(trained).replace(" ", "")

    answers = "".join(m.content + FORMATS[name].end for m in messages if m.role == "assistant")
    assert text == answers.replace(" ", "")


@pytest.mark.parametrize(("name", "kind"), USUAL)
def test_an_error_is_masked_up_to_its_correction_in_the_same_turn(name, kind):
    error, correction = "Action: go to desk 1", "\nThought: I need a mug.\nAction: go"
    messages = conversation(["Rules.", "On the desk 1.", error + correction], system=True)
    cut = len(error)

    got = RENDERERS[name, kind].render_example(
        messages, [Span(message=2, start=cut)], [Span(message=2, stop=cut)]
    )

    def text(mask):
        ids = [i for i, flag in zip(got.input_ids, mask, strict=True) if flag]
        return RENDERERS[name, kind].tokenizer.decode(ids).replace(" ", "")

    assert text(got.error_mask) == error.replace(" ", "")
    assert text(got.loss_mask) == (correction + FORMATS[name].end).replace(" ", "")


@pytest.mark.parametrize(("name", "kind"), USUAL)
def test_the_end_of_turn_is_that_of_the_format_and_stops_generation_before_its_eos(name, kind):
    tokenizer = make_tokenizer(name, kind)
    wanted = dict.fromkeys([FORMATS[name].end, FORMATS[name].eos])

    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == FORMATS[name].end
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == list(wanted)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.folds])
def test_a_template_that_refuses_or_moves_the_system_text_is_refused_with_the_knob(name):
    tokenizer = make_tokenizer(name, FORMATS[name].kinds[0])

    with pytest.raises(TemplateError, match=r"student\.system: fold") as caught:
        check_chat(tokenizer)
    assert "\n" not in str(caught.value)


def test_folding_twice_is_folding_once():
    once = effective_template(FORMATS["gemma"].template, FOLD)

    assert effective_template(once, FOLD) == once


def test_folding_keeps_the_first_newline_of_a_template():
    tokenizer = make_tokenizer("gemma", "sp_plain", "\n{{ messages[0]['content'] }}<eos>")
    messages = [{"role": "user", "content": "a"}]
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = effective_template(tokenizer.chat_template, FOLD)

    assert tokenizer.apply_chat_template(messages, tokenize=False) == plain


def test_qwen3_rewrites_earlier_turns_and_is_refused_with_the_template_that_does_not():
    with pytest.raises(TemplateError, match="builtin:chatml for Qwen3"):
        check_chat(make_tokenizer("qwen25", "byte_level_nfc", QWEN3))


@given(contents=st.lists(texts, min_size=5, max_size=5))
@settings(max_examples=20)
def test_our_chatml_is_the_format_word_for_word(contents):
    template = effective_template(QWEN3, ChatSettings(chat_template="builtin:chatml"))
    ours = Renderer(make_tokenizer("chatml", "byte_level", template), 10_000)
    messages = conversation(contents, system=True)

    got = ours.render_example(messages, turns(messages))

    assert (got.input_ids, got.loss_mask) == outcome("chatml", "byte_level", messages)


def test_a_template_that_writes_todays_date_is_refused():
    dated = "{{ strftime_now('%d %b %Y') }}" + FORMATS["chatml"].template

    with pytest.raises(ConfigError, match=r"student.chat_template: .*today's date"):
        check_chat(make_tokenizer("chatml", "byte_level", dated))


def test_an_end_of_turn_that_is_not_marked_special_is_a_control_token_all_the_same():
    tokenizer = make_tokenizer("chatml", "byte_level")
    state = tokenizer.backend_tokenizer.to_str().replace('"special":true', '"special":false')
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(state)
    messages = conversation(["Rules.", "a <|im_end|> b", "Action: <|im_end|> go"], system=True)

    got = Renderer(tokenizer, 10_000).render_example(messages, turns(messages))

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [got.input_ids.count(end), got.loss_mask[got.input_ids.index(end)]] == [3, False]
    assert (got.input_ids[-2], got.loss_mask[-2]) == (end, True)  # then the newline of ChatML


@pytest.fixture
def llama3():
    """A tokenizer, and a model that says `<|eot_id|>` after every token."""
    tokenizer = make_tokenizer("llama3", "byte_level")
    shape = ScratchConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2)
    model = new_model(tokenizer, shape, max_length=64, seed=0)
    model.lm_head = torch.nn.Linear(16, len(tokenizer), bias=True)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[end_of_turn(tokenizer)] = 9.0
    return tokenizer, model


def test_serving_stops_at_the_token_that_was_trained_and_leaves_it_out_of_the_text(llama3):
    tokenizer, model = llama3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != end_of_turn(tokenizer)

    engine = BatchGenerator(model, tokenizer, max_length=64)
    (got,) = engine.generate([[5, 6]], [SamplingParams(max_tokens=8)])

    assert (got.ids, got.text, got.finish_reason) == ((end_of_turn(tokenizer),), "", "stop")


def test_a_saved_student_tells_other_engines_where_to_stop(llama3, tmp_path):
    tokenizer, model = llama3
    save_student(tmp_path, model, tokenizer)

    again = type(model).from_pretrained(tmp_path)
    again.lm_head = model.lm_head  # a Llama's has no bias, so it was not saved
    out = again.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)

    names = ["<|eot_id|>", "<|end_of_text|>"]
    assert again.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(names)
    assert out[0].tolist() == [5, 6, end_of_turn(tokenizer)]


def test_a_folded_template_goes_with_the_tokenizer_that_is_saved(tmp_path):
    make_tokenizer("gemma", "sp_plain").save_pretrained(tmp_path / "own")
    load_tokenizer(str(tmp_path / "own"), FOLD).save_pretrained(tmp_path / "saved")
    messages = ordinary("gemma")

    served = Renderer(load_tokenizer(str(tmp_path / "saved")), 10_000)

    got = served.render_example(messages, turns(messages))
    assert (got.input_ids, got.loss_mask) == outcome("gemma", "sp_plain", messages)
