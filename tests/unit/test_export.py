"""Exports: what transformers and PEFT load speaks like the model that was trained."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chat_formats import FORMATS, make_tokenizer
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.dataset import Example, write_examples
from step_ray.errors import ConfigError
from step_ray.render import check_chat
from step_ray.training.batching import load_examples
from step_ray.training.chat_template import FOLD_SYSTEM, ChatSettings
from step_ray.training.export import export, generation_config
from step_ray.training.job import TOKENIZER_FOLDER, TrainJob, TrainResult
from step_ray.training.learner import Learner
from step_ray.training.student import (
    load_model,
    load_tokenizer,
    new_model,
    save_student,
    train_tokenizer,
)
from step_ray.training.turnend import end_of_turn

SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)
RESULT = TrainResult(
    num_steps=3,
    final_loss=1.25,
    trained_tokens=1234,
    seconds=2.0,
    tokens_per_s=100.0,
    num_restarts=0,
    exported_step=3,
    validation_loss=1.5,
    error_nll=4.25,
)
LORA = {"lora_rank": 4, "lora_alpha": 32.0}
PROMPT = [9, 10, 11, 12]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(folder / "model", new_model(tokenizer, SHAPE, max_length=64, seed=0), tokenizer)
    draw = random.Random(0)
    ids = [[draw.randint(7, 40) for _ in range(16)] for _ in range(12)]
    mask = [[position >= 8 for position in range(16)] for _ in ids]
    types = {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())}
    (folder / "examples").mkdir()
    table = pa.table({"input_ids": ids, "loss_mask": mask}, schema=pa.schema(types))
    pq.write_table(table, folder / "examples" / "part-0.parquet")
    return {"init": str(folder / "model"), "examples_dir": folder / "examples"}


def trained(inputs, folder: Path, dtype="float32", **config):
    """A learner after three steps, and its export in `folder / out`."""
    settings = TrainConfig(epochs=1, learning_rate=0.03, **config)
    learner = Learner(
        init=inputs["init"], dtype=dtype, config=settings, seed=0, device=torch.device("cpu")
    )
    examples = load_examples(inputs["examples_dir"])
    for number in range(3):
        learner.train_batch(examples, list(range(12)), number=number, lr=0.03)
    job = TrainJob(
        config=settings,
        **inputs,
        dtype=dtype,
        output_dir=folder / "out",
        work_dir=folder,
        seed=0,
        name="arm",
    )
    export(learner, folder / "out", job, examples, RESULT)
    base = learner.model.get_base_model() if settings.lora_rank else learner.model
    base.set_attn_implementation("sdpa")  # generation is not packed
    return learner


def speak(model) -> list[int]:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = model.eval().generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    return out[0].tolist()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits.float()


@pytest.mark.parametrize("config", [{}, LORA], ids=["full", "merged_lora"])
def test_a_merged_export_is_a_plain_model_that_speaks_like_the_trained_one(
    tmp_path, inputs, config
):
    learner = trained(inputs, tmp_path, **config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    assert speak(loaded) == speak(learner.model)
    assert speak(loaded) != speak(load_model(inputs["init"], "float32"))
    torch.testing.assert_close(logits(loaded), logits(learner.model), rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_adapter_export_loads_in_peft_transformers_and_here(tmp_path, inputs):
    learner = trained(inputs, tmp_path, export="adapter", **LORA)
    out = tmp_path / "out"
    expected = speak(learner.model)

    assert speak(AutoPeftModelForCausalLM.from_pretrained(out)) == expected
    assert speak(AutoModelForCausalLM.from_pretrained(out)) == expected
    assert speak(load_model(str(out), "float32")) == expected
    assert not (out / "model.safetensors").exists()
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 32.0)
    assert settings["base_model_name_or_path"] == inputs["init"]


def test_an_export_carries_tokenizer_template_and_stop_ids(tmp_path, inputs):
    trained(inputs, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")

    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(inputs["init"]).chat_template
    assert generation.eos_token_id == [tokenizer.convert_tokens_to_ids("<|end|>")]


def test_generation_stops_at_the_end_of_a_turn_where_that_is_not_the_end_of_text(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs["init"])
    tokenizer.eos_token = "<|pad|>"
    given = GenerationConfig(eos_token_id=4, temperature=0.6, do_sample=True)

    config = generation_config(given, tokenizer)

    end, pad = tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    assert config.eos_token_id == [end, pad, 4]
    assert (config.temperature, config.do_sample) == (0.6, True)
    assert given.eos_token_id == 4


def test_bfloat16_computation_trains_float32_weights_and_exports_the_given_type(tmp_path, inputs):
    learner = trained(inputs, tmp_path, dtype="bfloat16", autocast="bfloat16")

    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    expected = {n: p.bfloat16() for n, p in learner.model.state_dict().items()}
    torch.testing.assert_close(dict(loaded.state_dict()), expected, rtol=0, atol=0)


def test_a_lora_on_a_bfloat16_model_is_trained_in_float32_and_merged_before_rounding(
    tmp_path, inputs
):
    learner = trained(inputs, tmp_path, dtype="bfloat16", autocast="bfloat16", **LORA)

    types = {p.dtype for p in learner.model.parameters() if p.requires_grad}
    assert types == {torch.float32}
    name = "model.layers.0.self_attn.q_proj"
    module = learner.model.get_base_model().get_submodule(name)
    delta = 8.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    expected = (module.base_layer.weight.float() + delta).bfloat16()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    torch.testing.assert_close(loaded.get_submodule(name).weight, expected, rtol=0, atol=0)


def test_the_card_names_the_base_the_numbers_and_the_stop_tokens(tmp_path, inputs):
    trained(inputs, tmp_path, export="adapter", **LORA)
    card = (tmp_path / "out" / "README.md").read_text()

    assert card.startswith(f"---\nbase_model: {inputs['init']}\nlibrary_name: peft\n")
    assert "| tokens per epoch | 192, of which 96 carry loss |" in card
    assert "| validation loss | 1.5000 per trained token of held-out tasks |" in card
    assert "| error-step NLL | 4.2500 per masked error token of held-out tasks |" in card
    assert "Generation stops at `<|end|>`" in card


def test_lora_targets_and_dropout_are_those_of_the_config(tmp_path, inputs):
    config = {"lora_targets": ("q_proj", "v_proj"), "lora_dropout": 0.25, **LORA}
    trained(inputs, tmp_path, export="adapter", **config)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())

    assert sorted(settings["target_modules"]) == ["q_proj", "v_proj"]
    assert settings["lora_dropout"] == 0.25


def test_a_lora_target_that_the_model_lacks_is_named_with_those_it_has(tmp_path, inputs):
    with pytest.raises(ConfigError, match=r"'wqkv',\) is not in the model; it has \['down_proj'"):
        trained(inputs, tmp_path, lora_targets=("wqkv",), **LORA)


def test_a_folded_template_and_its_end_of_turn_go_out_with_the_model(tmp_path):
    own = make_tokenizer("gemma", "sp_plain")  # it refuses the system role, and EOS ends no turn
    save_student(tmp_path / "model", new_model(own, SHAPE, max_length=64, seed=0), own)
    init, data = str(tmp_path / "model"), tmp_path / "step"
    folded = load_tokenizer(init, ChatSettings(system="fold"))
    row = Example(trajectory_id="t", source="expert", input_ids=(5, 6), loss_mask=(False, True))
    write_examples(data, [row])
    folded.save_pretrained(data / TOKENIZER_FOLDER)
    settings = TrainConfig()
    learner = Learner(
        init=init, dtype="float32", config=settings, seed=0, device=torch.device("cpu")
    )
    job = TrainJob(
        config=settings,
        examples_dir=data,
        init=init,
        dtype="float32",
        output_dir=tmp_path / "out",
        work_dir=tmp_path,
        seed=0,
        name="step",
    )

    export(learner, tmp_path / "out", job, load_examples(data), RESULT)

    exported = load_tokenizer(str(tmp_path / "out"))
    assert exported.chat_template == FOLD_SYSTEM + FORMATS["gemma"].template
    check_chat(exported)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id[0] == end_of_turn(folded) != folded.eos_token_id
