"""The student: where its weights and tokenizer come from, and how they are written.

Takes `student.init` (a folder, a hub id, `builtin:<name>` or `scratch`), gives a Hugging Face model
and tokenizer. It neither trains the model nor renders a conversation.
"""

import hashlib
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from step_ray.config import ScratchConfig
from step_ray.errors import ConfigError

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|unk|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Prefix-stable: rendering more messages never changes the text of the earlier ones."""

ADAPTER_FILE = "adapter_config.json"
SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 16
"""How much of a weight file tells it from another one of the same size."""

WORD = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\n| ")
"""Words carry their leading space; digits stand alone, so numbers are copied digit by digit."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`; any text round-trips."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORD, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(
    tokenizer: PreTrainedTokenizerBase, shape: ScratchConfig, *, max_length: int, seed: int
) -> PreTrainedModel:
    """A Llama of the given shape with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.hidden_size * 3,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def resolve_init(init: str) -> str:
    """The folder or hub id that `student.init` stands for (not for `scratch`).

    Raises:
        ConfigError: an unknown builtin name, or a path that is no model folder.
    """
    if init.startswith("builtin:"):
        folder = Path(str(resources.files("step_ray"))) / "models" / init.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"student.init: {init!r} is not shipped with this version")
        return str(folder)
    path = Path(init).expanduser()
    looks_like_path = path.is_absolute() or init.startswith(".") or init.count("/") > 1
    if path.is_dir() or looks_like_path:
        if not any((path / name).is_file() for name in ("config.json", ADAPTER_FILE)):
            raise ConfigError(f"student.init: {init!r} holds no config.json; give a model folder")
        return str(path.resolve())
    return init


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, with a chat template and a pad token.

    Raises:
        ConfigError: it cannot be loaded, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise ConfigError(_load_fault("tokenizer", source, exc)) from exc
    if not tokenizer.chat_template:
        raise ConfigError(f"student.init: {source!r} has no chat template; use a chat model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, dtype: str) -> PreTrainedModel:
    """The causal language model of a folder or hub id; `dtype` is a torch dtype name.

    The folder of a LoRA adapter gives its base with the adapter merged.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        if (Path(source) / ADAPTER_FILE).is_file():
            return _merged(source, dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype)
        )
    except (OSError, ValueError, SafetensorError) as exc:
        raise ConfigError(_load_fault("model", source, exc)) from exc
    return model


def _merged(source: str, dtype: str) -> PreTrainedModel:
    from peft import AutoPeftModelForCausalLM

    # in float32, so that the sum of base and adapter is rounded once
    adapter: Any = AutoPeftModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    merged: PreTrainedModel = adapter.merge_and_unload().to(getattr(torch, dtype))
    merged.generation_config = GenerationConfig.from_pretrained(source)
    return merged


def check_init(init: str) -> None:
    """Load only the config and the tokenizer, so that a wrong name shows before any work.

    Raises:
        ConfigError: see `load_tokenizer`.
    """
    if init == "scratch":
        return
    source = resolve_init(init)
    try:
        load_config(source)
    except (OSError, ValueError) as exc:
        raise ConfigError(_load_fault("config", source, exc)) from exc
    load_tokenizer(source)


def vocabulary_size(source: str) -> int:
    """Rows of the embedding of a model folder or hub id, by its config."""
    return int(load_config(source).get_text_config().vocab_size)


def load_config(source: str) -> Any:
    """The model config of a folder or hub id; that of its base for a folder with a LoRA adapter."""
    adapter = Path(source) / ADAPTER_FILE
    if adapter.is_file():
        source = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return AutoConfig.from_pretrained(source)


def fingerprint(source: str) -> str:
    """Tells models in one folder apart: a digest of names, sizes and samples of its weight files.

    A hub id is fixed by its name; it gives an empty text.
    """
    folder = Path(source)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            for place in _sampled(file.stat().st_size):
                stream.seek(place)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sampled(size: int) -> list[int]:
    """Places in a file that are read: weights of gigabytes are not read whole for their name."""
    return [size * part // NUM_SAMPLES for part in range(NUM_SAMPLES)]


def save_student(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write model and tokenizer as a Hugging Face folder (safetensors)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_fault(what: str, source: str, exc: Exception) -> str:
    line = " ".join(str(exc).split())[:200]
    return (
        f"student.init: the {what} of {source!r} cannot be loaded; give a folder or hub id ({line})"
    )
