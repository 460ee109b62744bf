"""Export: the trained weights as a folder that transformers, PEFT and vLLM load.

Takes a `Learner`, writes safetensors (whole model or LoRA adapter), tokenizer with chat template,
generation config and model card. It chooses no weights (checkpoints.py) and moves nothing into
place (loop.py).
"""

import json
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from transformers import GenerationConfig, PreTrainedTokenizerBase

from step_ray.storage.places import shown, url_of
from step_ray.storage.remote import push
from step_ray.storage.runinfo import run_info
from step_ray.training.batching import Examples
from step_ray.training.job import RESULT_FILE, TrainJob, TrainResult
from step_ray.training.learner import Learner
from step_ray.training.model_files import set_base
from step_ray.training.sharding import gather
from step_ray.training.student import load_model, load_tokenizer
from step_ray.training.trainee import build_model
from step_ray.training.turnend import stop_ids


def export(
    learner: Learner, folder: Path, job: TrainJob, examples: Examples, result: TrainResult | None
) -> None:
    """Gather the weights (all ranks) and write the folder (rank 0, which has the result); an old
    one is replaced.

    Raises:
        TemplateError: the chat template ends no turn.
        ConfigError: the tokenizer cannot be loaded.
    """
    model = None if learner.rank else _container(job)
    gather(learner.model, model, trained_only=job.config.export == "adapter")
    if model is None:
        return
    assert result is not None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(job.tokenizer_source)
    model = _save_weights(model, folder, job)
    generation = generation_config(model.generation_config, tokenizer)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "stop_tokens": tokenizer.convert_ids_to_tokens(generation.eos_token_id),
        "world_size": learner.world_size,
    }
    card = model_card(job, examples, result, **facts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def place_model(folder: Path, target: Path) -> None:
    """Give an exported folder its name; in the store behind a mirror its result comes last.

    Raises:
        StorageError: the store does not take it.
    """
    if url_of(target) is not None:  # this node may have kept one that the run has set aside
        shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    push(target, last=RESULT_FILE)


def _container(job: TrainJob) -> Any:
    """The model as it was before the training, in the type in which it takes the weights."""
    config = job.config
    if not config.lora_rank:
        return load_model(job.init, job.dtype)
    # A LoRA is added to its base in float32: in bfloat16 the sum would be rounded twice.
    return build_model(job.init, "float32" if config.export == "merged" else job.dtype, config, 0)


def _save_weights(model: Any, folder: Path, job: TrainJob) -> Any:
    """Write weights and config; gives the model (of an adapter: its base)."""
    if job.config.export == "adapter":
        # without the base's config.json: transformers would take the folder for a whole model
        model.save_pretrained(folder)
        if url := url_of(job.init):
            set_base(folder, url)
        return model.get_base_model()
    whole = model.merge_and_unload() if job.config.lora_rank else model
    whole.to(getattr(torch, job.dtype)).save_pretrained(folder)
    return whole


def generation_config(
    given: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The base model's generation config, which stops where turns end.

    Raises:
        TemplateError: the chat template ends no turn.
    """
    config = GenerationConfig.from_dict(given.to_dict()) if given else GenerationConfig()
    ends = stop_ids(tokenizer, given)
    config.eos_token_id = list(ends)
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    return config


def model_card(
    job: TrainJob,
    examples: Examples,
    result: TrainResult,
    *,
    stop_tokens: Sequence[str],
    world_size: int,
) -> str:
    """The README of the folder: what was trained on what, and the numbers of the run."""
    info = run_info()
    template = resources.files("step_ray") / "templates" / "training_card.md.j2"
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        name=job.output_dir.name,
        base_model=shown(job.init),
        config=job.config,
        dtype=job.dtype,
        seed=job.seed,
        num_examples=len(examples.lengths),
        num_tokens=int(examples.lengths.sum()),
        num_trained=int(examples.num_trained.sum()),
        num_masked=_num_masked(job.examples_dir),
        result=result,
        stop_tokens=[f"`{token}`" for token in stop_tokens],
        world_size=world_size,
        info=info,
        versions=", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    )


def _num_masked(folder: Path) -> int | None:
    """Masked error tokens of the dataset, by its summary; None: it has none."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return None
    return int(json.loads(summary.read_text(encoding="utf-8"))["num_masked_tokens"])
