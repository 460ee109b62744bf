"""The student: where its weights and tokenizer come from, and how they are written.

Takes `student.init` (a folder, a hub id, `builtin:<name>` or `scratch`), gives a Hugging Face model
and tokenizer. It neither trains the model nor renders a conversation.
"""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from step_ray.config import ScratchConfig
from step_ray.errors import ConfigError
from step_ray.render import check_chat
from step_ray.storage.places import is_url
from step_ray.storage.remote import fetch
from step_ray.training.chat_template import ChatSettings, effective_template
from step_ray.training.model_files import (
    ADAPTER_FILE,
    check_shapes,
    check_whole,
    is_adapter,
    load_config,
    merged_adapter,
    positions_of,
    refuse_pickle,
    weight_shapes,
)
from step_ray.training.turnend import stop_ids

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

OWN_CHAT = ChatSettings()
LOAD_FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What Hugging Face raises for folders that are missing, broken or do not fit together."""

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
    """The folder or hub id that `student.init` stands for (not for `scratch`); what has an address
    in a store is brought to this node.

    Raises:
        ConfigError: an unknown builtin name, or a path that is no model folder.
    """
    if init.startswith("builtin:"):
        folder = Path(str(resources.files("step_ray"))) / "models" / init.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"student.init: {init!r} is not shipped with this version")
        return str(folder)
    if is_url(init):
        return _folder(init, fetch(init))
    path = Path(init).expanduser()
    looks_like_path = path.is_absolute() or init.startswith(".") or init.count("/") > 1
    if path.is_dir() or looks_like_path:
        return _folder(init, path)
    return init


def _folder(init: str, path: Path) -> str:
    if not any((path / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        raise ConfigError(f"student.init: {init!r} holds no config.json; give a model folder")
    return str(path.resolve())


def load_tokenizer(source: str, chat: ChatSettings = OWN_CHAT) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, with a chat template and a pad token.

    Args:
        source: the folder or hub id.
        chat: which template it gets; by default its own.

    Raises:
        ConfigError: it cannot be loaded, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except LOAD_FAULTS as exc:
        raise ConfigError(_load_fault("tokenizer", source, exc)) from exc
    tokenizer.chat_template = effective_template(own, chat)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"student.init: {source!r} has no chat template; use a chat model, or name a template"
            " in student.chat_template"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, dtype: str) -> PreTrainedModel:
    """The causal language model of a folder or hub id; `dtype` is a torch dtype name.

    The folder of a LoRA adapter gives its base with the adapter merged.
    Only safetensors are read, and no code that comes with the model is run.

    Raises:
        ConfigError: it cannot be loaded, or a weight is missing or has another shape.
    """
    refuse_pickle(source)
    try:
        if is_adapter(source):
            return merged_adapter(source, getattr(torch, dtype))
        loaded: tuple[PreTrainedModel, Any] = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # it would name no weight; `check_whole` does
            output_loading_info=True,
        )
    except LOAD_FAULTS as exc:
        raise ConfigError(_load_fault("model", source, exc)) from exc
    model, report = loaded
    check_whole(source, report)
    return model


def empty_model(source: str, dtype: str) -> PreTrainedModel:
    """The same model on the meta device: it has the shapes of its weights, and no weights.

    Types and ties are those that the config says; a checkpoint may have others.

    Raises:
        ConfigError: its config cannot be loaded.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                load_config(source), dtype=getattr(torch, dtype), trust_remote_code=False
            )
    except LOAD_FAULTS as exc:
        raise ConfigError(_load_fault("config", source, exc)) from exc
    return model


def check_student(init: str, chat: ChatSettings, max_length: int) -> None:
    """Look at all of a student that can be seen without its weights, before any work.

    Raises:
        ConfigError: see `load_tokenizer` and `check_model`; or a `max_length` beyond the model.
        TemplateError: its conversations cannot be masked, see `render.check_chat`.
    """
    if init == "scratch":
        return
    source = resolve_init(init)
    _causal_config(source)  # first: a tokenizer's loader reads it too, and would be blamed
    tokenizer = load_tokenizer(source, chat)
    check_model(source, tokenizer)
    most = positions_of(source)
    if most is not None and max_length > most:
        raise ConfigError(
            f"student.max_length: {max_length} is more than the {most} positions of {source!r}"
            " (max_position_embeddings); lower it"
        )
    check_chat(tokenizer)


def check_model(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look at a model's config and the headers of its weights, and whether these and the tokenizer
    fit.

    Args:
        source: a folder or hub id, see `resolve_init`.
        tokenizer: what the model is trained or served with.

    Raises:
        ConfigError: no causal language model, unreadable weights or of other shapes, or a token
            without an embedding.
    """
    config = _causal_config(source)
    shapes = weight_shapes(Path(source)) if Path(source).is_dir() else {}
    last, size = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if last >= size:
        raise ConfigError(
            f"student.init: the tokenizer has ids up to {last}, but the vocabulary of the model"
            f" {source!r} ends at {size - 1} (vocab_size); use the model's own tokenizer, or resize"
            " its embedding"
        )
    # of a quantized model the weights on disk are packed
    if shapes and not is_adapter(source) and not getattr(config, "quantization_config", None):
        check_shapes(source, shapes, empty_model(source, "float32"))


def model_type(init: str) -> str:
    """The architecture of a student, as transformers names it.

    Raises:
        ConfigError: no causal language model.
    """
    if init == "scratch":
        return str(LlamaConfig.model_type)
    return str(_causal_config(resolve_init(init)).model_type)


def _causal_config(source: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = load_config(source)
    except LOAD_FAULTS as exc:
        raise ConfigError(_load_fault("config", source, exc)) from exc
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"student.init: {source!r} is a {config.model_type!r}, no causal language model"
        )
    return config


def save_student(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write model and tokenizer as a Hugging Face folder (safetensors).

    Its generation_config.json names every token at which generation stops (turnend.py), so that
    other engines stop there too.
    """
    config = model.generation_config
    if config is not None:
        config.eos_token_id = list(stop_ids(tokenizer, config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_fault(what: str, source: str, exc: Exception) -> str:
    line = " ".join(str(exc).split())[:200]
    return (
        f"student.init: the {what} of {source!r} cannot be loaded; give a folder or hub id ({line})"
    )
