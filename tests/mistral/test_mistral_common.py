"""Real tokenizers against Mistral's own encoder: the ids of a conversation and of its prompts.

`make test-mistral` runs this in an environment of its own, for mistral_common wants an older numpy
than ours. Elsewhere it is skipped.
"""

import json
from functools import cache
from pathlib import Path

import pytest

mistral_common = pytest.importorskip("mistral_common", reason="`make test-mistral` installs it")

from chat_formats import FORMATS  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mistral_common.protocol.instruct import messages as theirs  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.protocol.instruct.validator import ValidationMode  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.integrations.mistral import convert_tekken_tokenizer  # noqa: E402

from step_ray.render import Renderer, Span  # noqa: E402
from step_ray.types import Message  # noqa: E402

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_tekken": "tekken_240718.json",
}
ROLES = {
    "system": theirs.SystemMessage,
    "user": theirs.UserMessage,
    "assistant": theirs.AssistantMessage,
}
WORDS = ["Thought: I need a mug.\n", "Action: go to desk 1", "\n", " ", "é", "🙂", "好", "</s>"]
WORDS += ["[INST]", "[/INST]", "<s>", "<unk>", "a", ")", "<0x0A>"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)
# Mistral's own encoder strips nothing, its templates strip some answers; and what transformers
# converts a SentencePiece model to makes other tokens of two blanks in a row.
texts = texts.filter(lambda text: "  " not in text).map(lambda text: f"x{text}y")


@pytest.fixture(scope="module")
def renderers(tmp_path_factory):
    return {name: Renderer(tokenizer(name, tmp_path_factory), 10_000) for name in FILES}


def tokenizer(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    source = DATA / FILES[name]
    if source.suffix == ".json":
        fast = convert_tekken_tokenizer(str(source))
    else:
        (folder / "tokenizer.model").write_bytes(source.read_bytes())
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, **names})
        )
        fast = AutoTokenizer.from_pretrained(folder)
    if name != "mistral_v1":
        fast.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    fast.bos_token, fast.eos_token = "<s>", "</s>"
    fast.chat_template = FORMATS[name].template
    return fast


@cache
def encoder(name, mode):
    return MistralTokenizer.from_file(str(DATA / FILES[name]), mode=mode)


def reference(name, messages, mode):
    request = ChatCompletionRequest(messages=[ROLES[m.role](content=m.content) for m in messages])
    return encoder(name, mode).encode_chat_completion(request).tokens


def conversation(contents):
    roles = ["user", "assistant"] * len(contents)
    return [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=30)
@given(contents=st.lists(texts, min_size=4, max_size=4))
def test_ids_are_those_of_mistrals_own_encoder(renderers, name, contents):
    messages = conversation(contents)
    spans = [Span(message=1), Span(message=3)]

    got = renderers[name].render_example(messages, spans)

    whole = reference(name, messages, ValidationMode.finetuning)
    prompt = reference(name, messages[:3], ValidationMode.test)
    assert list(got.input_ids) == whole
    assert renderers[name].render_prompt(messages[:3]) == prompt
    assert got.loss_mask[len(prompt) - 1 : len(prompt) + 1] == (False, True)
    assert (got.input_ids[-1], got.loss_mask[-1]) == (2, True)
