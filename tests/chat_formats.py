"""Chat formats for tests, each told twice: a Jinja template, and a plain Python spec of its pieces.

The spec knows nothing of the renderer: it names the control tokens and texts of a conversation in
their order, and `expected` encodes them one after the other. Small tokenizers of each kind are
trained here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Thought: I need a mug.\nAction: go to desk 1",
    "On the desk 1, you see a mug 2.\n\nNothing happens. <tag> | end",
    "INST SYS system user assistant model café ﬁne",
] * 3


@dataclass(frozen=True)
class Piece:
    """A control token, or a text; `turn`: the agent's message that it belongs to."""

    text: str
    control: bool = False
    turn: int | None = None


@dataclass(frozen=True)
class Format:
    """One chat format."""

    template: str
    spec: Callable
    """Messages -> pieces, up to the end of the last message."""
    end: str
    """What ends a turn of the agent."""
    eos: str
    bos: str | None
    controls: tuple[str, ...]
    kinds: tuple[str, ...]
    """Kinds of tokenizers of the models that speak it; ordinary text must render with these."""
    folds: bool = False
    """The system text goes into the first question (student.system: fold)."""


def control(text, turn=None):
    return Piece(text, True, turn)


def rounds(messages):
    """The system text, or none, and the other messages with their places."""
    numbered = list(enumerate(messages))
    if messages[0].role == "system":
        return messages[0].content, numbered[1:]
    return "", numbered


def folded(messages):
    """The messages with the system text in the first question, places as they were."""
    system, others = rounds(messages)
    texts = [message.content for _, message in others]
    if messages[0].role == "system":
        texts[0] = f"{system}\n\n{texts[0]}"
    return [(i, m.role, text) for (i, m), text in zip(others, texts, strict=True)]


LLAMA2 = (
    "{% set ns = namespace(system='') %}"
    "{% if messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{% if loop.first and ns.system %}"
    "{% set text = '<<SYS>>\n' + ns.system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama2(messages):
    system, others = rounds(messages)
    for place, (index, message) in enumerate(others):
        text = message.content
        if place == 0 and system:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        if message.role == "user":
            yield control("<s>")
            yield Piece(f"[INST] {text.strip()} [/INST]")
        else:
            yield Piece(f" {text.strip()} ", turn=index)
            yield control("</s>", index)


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3(messages):
    yield control("<|begin_of_text|>")
    for index, message in enumerate(messages):
        turn = index if message.role == "assistant" else None
        yield control("<|start_header_id|>")
        yield Piece(message.role)
        yield control("<|end_header_id|>")
        yield Piece("\n\n")
        yield Piece(message.content.strip(), turn=turn)
        yield control("<|eot_id|>", turn)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages):
    for index, message in enumerate(messages):
        turn = index if message.role == "assistant" else None
        yield control("<|im_start|>")
        yield Piece(f"{message.role}\n")
        yield Piece(message.content, turn=turn)
        yield control("<|im_end|>", turn)
        yield Piece("\n")


QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' or m.role == 'assistant'"
    " or (m.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def qwen25(messages):
    if messages[0].role != "system":
        yield control("<|im_start|>")
        yield Piece("system\nBe helpful.")
        yield control("<|im_end|>")
        yield Piece("\n")
    yield from chatml(messages)


QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set text = m.content %}{%- if m.role == 'assistant' %}"
    "{%- set thought = '' %}{%- if '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{%- set text = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') %}"
    "{%- endif %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Rewrites earlier turns: for the tests of what is refused."""

MISTRAL_V1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral_v1(messages):
    yield control("<s>")
    for index, role, text in folded(messages):
        if role == "user":
            yield Piece(f" [INST] {text} [/INST]")
        else:
            yield Piece(f" {text}", turn=index)
            yield control("</s>", index)


def mistral_v3_template(*, spaced):
    """`[INST]` is a control token; the system text goes with the last question."""
    gap = " " if spaced else ""
    return (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
        f"{{{{ '[INST]{gap}' + system + '\n\n' + m['content'] + '[/INST]' }}}}"
        f"{{% else %}}{{{{ '[INST]{gap}' + m['content'] + '[/INST]' }}}}{{% endif %}}"
        f"{{% else %}}{{{{ '{gap}' + m['content'] | trim + eos_token }}}}"
        "{% endif %}{% endfor %}"
    )


def mistral_v3(messages, gap=" "):
    yield control("<s>")
    for index, role, text in folded(messages):
        if role == "user":
            yield control("[INST]")
            yield Piece(f"{gap}{text}")
            yield control("[/INST]")
        else:
            yield Piece(f"{gap}{text.strip()}", turn=index)
            yield control("</s>", index)


def mistral_tekken(messages):
    return mistral_v3(messages, gap="")


MISTRAL_V7 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral_v7(messages):
    yield control("<s>")
    for index, message in enumerate(messages):
        if message.role == "assistant":
            yield Piece(message.content, turn=index)
            yield control("</s>", index)
        else:
            name = "SYSTEM_PROMPT" if message.role == "system" else "INST"
            yield control(f"[{name}]")
            yield Piece(message.content)
            yield control(f"[/{name}]")


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def gemma(messages):
    yield control("<bos>")
    for index, role, text in folded(messages):
        turn = index if role == "assistant" else None
        yield control("<start_of_turn>")
        yield Piece(f"{'model' if turn is not None else role}\n")
        yield Piece(text.strip(), turn=turn)
        yield control("<end_of_turn>", turn)
        yield Piece("\n")


LLAMA3_CONTROLS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>")
LLAMA3_CONTROLS += ("<|end_header_id|>", "<|eot_id|>")
IM = ("<|im_start|>", "<|im_end|>")
INST = ("[INST]", "[/INST]")
FORMATS = {
    "llama2": Format(
        LLAMA2,
        llama2,
        "</s>",
        "</s>",
        "<s>",
        ("<s>", "</s>"),
        ("sp_legacy", "sp_first", "sp_always"),
    ),
    "llama3": Format(
        LLAMA3,
        llama3,
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|begin_of_text|>",
        LLAMA3_CONTROLS,
        ("byte_level",),
    ),
    "chatml": Format(
        CHATML, chatml, "<|im_end|>", "<|endoftext|>", None, ("<|endoftext|>", *IM), ("byte_level",)
    ),
    "qwen25": Format(
        QWEN25,
        qwen25,
        "<|im_end|>",
        "<|im_end|>",
        None,
        ("<|endoftext|>", *IM),
        ("byte_level_nfc",),
    ),
    "mistral_v1": Format(
        MISTRAL_V1, mistral_v1, "</s>", "</s>", "<s>", ("<s>", "</s>"), ("sp_legacy",), folds=True
    ),
    "mistral_v3": Format(
        mistral_v3_template(spaced=True),
        mistral_v3,
        "</s>",
        "</s>",
        "<s>",
        ("<s>", "</s>", *INST),
        ("sp_first", "sp_always"),
        folds=True,
    ),
    "mistral_tekken": Format(
        mistral_v3_template(spaced=False),
        mistral_tekken,
        "</s>",
        "</s>",
        "<s>",
        ("<s>", "</s>", *INST),
        ("byte_level",),
        folds=True,
    ),
    "mistral_v7": Format(
        MISTRAL_V7,
        mistral_v7,
        "</s>",
        "</s>",
        "<s>",
        ("<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", *INST),
        ("byte_level",),
    ),
    "gemma": Format(
        GEMMA,
        gemma,
        "<end_of_turn>",
        "<eos>",
        "<bos>",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("sp_plain",),
        folds=True,
    ),
}

GPT_WORDS = Regex(r"'s|'t| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _byte_level(normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(GPT_WORDS, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentence_piece(scheme):
    """BPE over whole texts with blanks marked; unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = normalizers.Replace(" ", "▁")
    if scheme == "legacy":  # Llama 2: each text between control tokens gets a blank of its own.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks])
        tokenizer.decoder = _decoder(strip=True)
    elif scheme in ("first", "always"):  # the first text of all only; each that has no blank
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = _decoder(strip=True)
    else:  # Gemma: none.
        tokenizer.normalizer = marks
        tokenizer.decoder = _decoder(strip=False)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    # Trained on words, as SentencePiece does, so that no token spans two of them.
    words = [word for text in CORPUS for word in text.replace("\n", " \n ").split(" ") if word]
    lead = " " if scheme == "plain" else ""
    tokenizer.train_from_iterator([lead + word for word in words], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:1]  # The bytes are ordinary tokens.
    return Tokenizer.from_str(json.dumps(state))


def _decoder(*, strip):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


BACKENDS = {
    "byte_level": _byte_level,
    "byte_level_nfc": lambda: _byte_level(normalizers.NFC()),
    "sp_legacy": lambda: _sentence_piece("legacy"),
    "sp_first": lambda: _sentence_piece("first"),
    "sp_always": lambda: _sentence_piece("always"),
    "sp_plain": lambda: _sentence_piece("plain"),
}


@cache
def _backend_json(kind):
    return BACKENDS[kind]().to_str()


def make_tokenizer(name, kind, template=None):
    """A small tokenizer of a kind that speaks a format."""
    form = FORMATS[name]
    backend = Tokenizer.from_str(_backend_json(kind))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in form.controls])
    unk = {"unk_token": "<unk>"} if kind.startswith("sp") else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=form.bos,
        eos_token=form.eos,
        chat_template=template or form.template,
        clean_up_tokenization_spaces=False,
        **unk,
    )


class Merged(Exception):
    """A token spans the edge between a prompt and the agent's answer."""


def expected(name, kind, messages):
    """Ids and trained flags of a conversation, piece by piece; every turn is trained.

    Raises:
        Merged: the tokens of a prompt are not the first ones of the whole.
    """
    backend = Tokenizer.from_str(_backend_json(kind))
    vocab = make_tokenizer(name, kind).get_vocab()
    if kind == "sp_first":  # no text here is the first: a control token is
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.encode_special_tokens = True

    def encode(text):
        return backend.encode(text, add_special_tokens=False).ids

    ids, flags = [], []
    run = []  # texts since the last control token
    for piece in [*FORMATS[name].spec(messages), control("")]:
        if not piece.control:
            run.append(piece)
            continue
        whole = encode("".join(p.text for p in run))
        before = encode("".join(p.text for p in _until_turn(run)))
        if any(p.turn is not None for p in run) and whole[: len(before)] != before:
            raise Merged
        trained = any(p.turn is not None for p in run)
        ids += whole
        flags += [trained and place >= len(before) for place in range(len(whole))]
        run = []
        if piece.text:
            ids.append(vocab[piece.text])
            flags.append(piece.turn is not None)
    return ids, flags


def _until_turn(run):
    """The texts of a prompt that stand before the agent's."""
    pieces = []
    for piece in run:
        if piece.turn is not None:
            break
        pieces.append(piece)
    return pieces
