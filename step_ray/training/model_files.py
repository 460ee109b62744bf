"""What lies in a model folder: a whole model or a LoRA adapter, and which one.

Takes a folder or hub id, gives its config, the model of an adapter, or a fingerprint, and refuses
weights that are pickled, cut off or incomplete. Which folder a student comes from, and its
tokenizer, is student.py's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from step_ray.errors import ConfigError, boundary
from step_ray.storage.places import is_url
from step_ray.storage.remote import fetch

ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = {False: "model.safetensors", True: "adapter_model.safetensors"}
"""Whether it is an adapter -> where its weights are."""
SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 16
"""How much of a weight file tells it from another one of the same size."""


def is_adapter(source: str) -> bool:
    """Whether a folder holds a LoRA adapter in the place of a whole model."""
    return (Path(source) / ADAPTER_FILE).is_file()


def adapter_config(source: str) -> Mapping[str, Any]:
    """PEFT's config of the adapter in a folder; it names the base and the rank `r`."""
    text = (Path(source) / ADAPTER_FILE).read_text(encoding="utf-8")
    config: Mapping[str, Any] = json.loads(text)
    return config


def adapter_base(source: str) -> str:
    """The base of the adapter in a folder; one with an address is brought to this node."""
    return str(fetch(adapter_config(source)["base_model_name_or_path"]))


def set_base(folder: Path, place: str) -> None:
    """Let an adapter name the address of its base, where every node finds it.

    PEFT itself looks for a base that is no folder on the hub, so this is done when it has saved.
    """
    file = folder / ADAPTER_FILE
    record = {**adapter_config(str(folder)), "base_model_name_or_path": place}
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_config(source: str) -> Any:
    """The model config of a folder or hub id; that of its base for the folder of an adapter."""
    if is_adapter(source):
        source = adapter_base(source)
    return AutoConfig.from_pretrained(source)


def positions_of(source: str) -> int | None:
    """Tokens that a model was made to read at once; None where its config names no end."""
    config = load_config(source).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    # a stretched RoPE (YaRN, linear) reaches further than the positions it was trained with
    rope = getattr(config, "rope_parameters", None) or {}
    stretched = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or most)
    return max(int(most), int(stretched))


def merged_adapter(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base of an adapter with the adapter merged into it."""
    from peft import AutoPeftModelForCausalLM, PeftModel

    # in float32, so that the sum of base and adapter is rounded once
    adapter: Any
    if is_url(adapter_config(source)["base_model_name_or_path"]):
        base = AutoModelForCausalLM.from_pretrained(adapter_base(source), dtype=torch.float32)
        adapter = PeftModel.from_pretrained(base, source)
    else:
        adapter = AutoPeftModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    merged: PreTrainedModel = adapter.merge_and_unload().to(dtype)
    merged.generation_config = GenerationConfig.from_pretrained(source)
    return merged


def fingerprint(source: str) -> str:
    """Tells models in one folder apart: a digest of names, sizes and samples of its weight files.

    A hub id is fixed by its name; it gives an empty text.
    """
    folder = Path(source)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            # weights of gigabytes are not read whole for their name
            for part in range(NUM_SAMPLES):
                stream.seek(size * part // NUM_SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def refuse_pickle(source: str) -> None:
    """Refuse a folder whose weights are pickles, which run code when they are read.

    Raises:
        ConfigError: it holds `*.bin`, `*.pt` or `*.pth` and no safetensors.
    """
    folder = Path(source)
    pickles = sorted(p.name for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"student.init: {source!r} holds pickled weights ({pickles[0]}), which can run code;"
            " convert them to safetensors (save_pretrained writes these)"
        )


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the headers of the weights: their shapes by name, and whether a file was cut off.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    refuse_pickle(str(folder))
    shapes: dict[str, tuple[int, ...]] = {}
    with boundary(ConfigError, f"student.init: the weights in {str(folder)!r} cannot be read"):
        files = {WEIGHTS_FILE[is_adapter(str(folder))]}
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for file in sorted(files):
            with safe_open(folder / file, "pt") as weights:
                names = weights.keys()  # no dict: it cannot be gone through itself
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    return shapes


def check_shapes(
    source: str, found: Mapping[str, tuple[int, ...]], wanted: PreTrainedModel
) -> None:
    """Refuse weights of other shapes than the model's, as far as that shows without reading them.

    Looked at are those that go by the same name on both sides; sides in another order are left to
    whoever loads them, because for some models transformers turns weights.

    Args:
        source: a folder, for the error.
        found: from `weight_shapes`.
        wanted: the model that its config describes; an empty one will do.

    Raises:
        ConfigError: see above.
    """
    shapes = {name: tuple(value.shape) for name, value in wanted.state_dict().items()}
    other = [
        (name, found[name], shapes[name])
        for name in found.keys() & shapes.keys()
        if sorted(found[name]) != sorted(shapes[name])
    ]
    check_whole(source, {"mismatched_keys": other, "missing_keys": []})


def check_whole(source: str, report: Mapping[str, Any]) -> None:
    """Refuse a model to which transformers gave random weights in the place of some.

    Args:
        source: a folder or hub id.
        report: what `from_pretrained(output_loading_info=True)` says of it.

    Raises:
        ConfigError: a weight is missing, or has another shape than its config says.
    """
    other = sorted(report["mismatched_keys"])
    if other:
        name, found, wanted = other[0]
        raise ConfigError(
            f"student.init: the model of {source!r} has {name!r} of shape {tuple(found)}, but its"
            f" config wants {tuple(wanted)} ({len(other)} differ); give weights and config of one"
            " model"
        )
    lost = sorted(report["missing_keys"])
    if lost:
        raise ConfigError(
            f"student.init: the model of {source!r} lacks {lost[0]!r} ({len(lost)} missing); give a"
            " complete causal language model"
        )
