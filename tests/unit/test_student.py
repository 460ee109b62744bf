"""Students that cannot be used: each is refused in one line before any work."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from step_ray.config import ScratchConfig
from step_ray.errors import ConfigError, StepRayError, TemplateError
from step_ray.training.chat_template import ChatSettings
from step_ray.training.student import (
    CHAT_TEMPLATE,
    check_student,
    load_model,
    load_tokenizer,
    new_model,
    save_student,
    train_tokenizer,
)

SHAPE = ScratchConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2)
OWN = ChatSettings()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tokenizer = train_tokenizer(["Thought: I look.\nAction: look"] * 3, 300)
    save_student(folder, new_model(tokenizer, SHAPE, max_length=64, seed=0), tokenizer)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder, chat=OWN, error=ConfigError):
    with pytest.raises(StepRayError) as caught:
        check_student(str(folder), chat, 64)
    assert type(caught.value) is error and caught.value.exit_code == 2
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_whole_folder_is_taken(folder):
    check_student(str(folder), OWN, 64)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.json", "{", "the config of"),
        ("config.json", "{}", "the config of"),
        ("config.json", '{"model_type": "t5"}', "is a 't5', no causal language model"),
        ("tokenizer.json", "{", "the tokenizer of"),
        ("tokenizer.json", "{}", "the tokenizer of"),
        ("tokenizer_config.json", "{", "the tokenizer of"),
        ("model.safetensors", "x" * 100, "the weights in"),
        ("model.safetensors", None, "the weights in"),
    ],
)
def test_an_unreadable_folder_names_the_part(folder, name, content, what):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    line = refusal(folder)
    assert line.startswith("student.init: ") and what in line and str(folder) in line


def test_weights_that_were_cut_off_are_found_without_loading_them(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "the weights in" in refusal(folder)


def test_a_shard_that_the_index_names_must_be_there(folder):
    shards = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "model-2.safetensors" in refusal(folder)


def test_a_weight_that_is_not_in_the_file_is_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 'model.norm.weight' \(1 missing\); give a comp"):
        load_model(str(folder), "float32")


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:9].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shapes = r"'model.norm.weight' of shape \(9,\), but its config wants \(16,\) \(1 differ\)"
    assert re.search(shapes, refusal(folder))  # by the header alone, before any work
    with pytest.raises(ConfigError, match=shapes):
        load_model(str(folder), "float32")


def test_the_config_of_another_size_is_refused_before_any_work(folder):
    edit(folder / "config.json", hidden_size=32)
    assert "of shape (279, 16), but its config wants (279, 32)" in refusal(folder)


def test_packed_weights_of_a_quantized_model_are_left_to_its_loader(folder):
    edit(folder / "config.json", hidden_size=32, quantization_config={"quant_method": "awq"})
    check_student(str(folder), OWN, 64)


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(folder):
    last = max(load_tokenizer(str(folder)).get_vocab().values())
    edit(folder / "config.json", vocab_size=last)
    assert f"ids up to {last}, but the vocabulary" in refusal(folder)
    with pytest.raises(ConfigError, match="the model of"):
        load_model(str(folder), "float32")


def test_an_embedding_larger_than_the_tokenizer_is_usual(whole, tmp_path):
    tokenizer = load_tokenizer(str(whole))
    model = new_model(tokenizer, SHAPE, max_length=64, seed=0)
    model.resize_token_embeddings(512)
    save_student(tmp_path, model, tokenizer)
    check_student(str(tmp_path), OWN, 64)


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_knob(folder):
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(folder)
    assert "student.chat_template" in refusal(folder)


def test_a_file_gives_a_base_model_its_chat_template(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATE)
    check_student(str(folder), ChatSettings(chat_template=str(tmp_path / "mine.jinja")), 64)


@pytest.mark.parametrize(
    ("name", "what"), [("./no.jinja", "cannot be read"), ("builtin:none", "use builtin:chatml")]
)
def test_a_chat_template_that_is_not_there(folder, name, what):
    line = refusal(folder, ChatSettings(chat_template=name))
    assert line.startswith(f"student.chat_template: {name!r} ") and what in line


def test_a_chat_template_whose_end_is_no_token_of_the_tokenizer(folder):
    line = refusal(folder, ChatSettings(chat_template="builtin:chatml"), TemplateError)
    assert "no control token behind an answer" in line and "student.chat_template" in line


def test_a_chat_template_that_is_no_jinja(folder):
    (folder / "chat_template.jinja").write_text("{% for m in")
    assert "TemplateSyntaxError" in refusal(folder, error=TemplateError)


def test_a_context_longer_than_the_model_is_refused_with_both_lengths(folder):
    edit(folder / "config.json", max_position_embeddings=63)
    assert "student.max_length: 64 is more than the 63 positions of" in refusal(folder)


def test_a_stretched_rope_reaches_as_far_as_it_says(folder):
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    edit(folder / "config.json", max_position_embeddings=32, rope_parameters=rope)
    check_student(str(folder), OWN, 64)
