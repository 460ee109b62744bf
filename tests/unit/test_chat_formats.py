"""Every chat format with every kind of tokenizer, against a plain spec of the format.

What is asked of each: the ids are those of its pieces encoded one by one, exactly the agent's turns
with their end-of-turn tokens are trained, and where a token would span a prompt and its answer the
conversation is refused.
"""

import pytest
from chat_formats import BACKENDS, FORMATS, Merged, expected, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.errors import TemplateError
from step_ray.render import Renderer, Span
from step_ray.turnend import end_of_turn
from step_ray.types import Message

PAIRS = [(name, kind) for name in FORMATS for kind in BACKENDS]
USUAL = [(name, kind) for name, form in FORMATS.items() for kind in form.kinds]
RENDERERS = {pair: Renderer(make_tokenizer(*pair), 10_000) for pair in PAIRS}

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
    system = system and not FORMATS[name].folds
    messages = conversation(contents if system else contents[:4], system)

    assert rendered(name, kind, messages) == outcome(name, kind, messages)


@pytest.mark.parametrize(("name", "kind"), USUAL)
def test_ordinary_text_is_rendered_and_not_refused(name, kind):
    contents = ["Rules.", "On the desk 1, you see a mug 2.", "Action: go to desk 1"]
    contents += ["Nothing happens.", "Thought: I need a mug.\nAction: go to desk 1"]
    system = not FORMATS[name].folds
    messages = conversation(contents if system else contents[1:], system)

    assert rendered(name, kind, messages) == outcome(name, kind, messages) is not None


@pytest.mark.parametrize(("name", "kind"), USUAL)
def test_the_end_of_turn_is_that_of_the_format_and_not_its_eos(name, kind):
    tokenizer = make_tokenizer(name, kind)

    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == FORMATS[name].end
