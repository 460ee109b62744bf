"""What a training leaves behind speaks as it was trained and says where a turn ends."""

import json

import pytest
import torch
from chat_formats import FORMATS, make_tokenizer

from step_ray.batching import Examples
from step_ray.chat_template import FOLD_SYSTEM, ChatSettings
from step_ray.config import ScratchConfig, TrainConfig
from step_ray.export import export
from step_ray.learner import Learner
from step_ray.render import check_chat
from step_ray.student import load_tokenizer, new_model, save_student
from step_ray.train_job import TrainJob, TrainResult
from step_ray.turnend import end_of_turn

EXAMPLES = Examples(
    input_ids=torch.tensor([1, 2]),
    loss_mask=torch.tensor([False, True]),
    starts=torch.tensor([0]),
    lengths=torch.tensor([2]),
    num_trained=torch.tensor([1]),
)
RESULT = TrainResult(
    num_steps=1, final_loss=1, trained_tokens=1, seconds=1, tokens_per_s=1, num_restarts=0
)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A model whose template refuses the system role, and whose EOS ends no turn."""
    folder = tmp_path_factory.mktemp("init")
    tokenizer = make_tokenizer("gemma", "sp_plain")
    shape = ScratchConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2)
    save_student(folder, new_model(tokenizer, shape, max_length=64, seed=0), tokenizer)
    return folder


def test_an_exported_folder_has_the_template_and_the_end_of_its_examples(init, tmp_path):
    examples = tmp_path / "datasets" / "step"
    folded = load_tokenizer(str(init), ChatSettings(system="fold"))
    folded.save_pretrained(examples / "tokenizer")
    learner = Learner(
        init=str(init), dtype="float32", config=TrainConfig(), seed=0, device=torch.device("cpu")
    )

    export(learner, tmp_path / "out", job(init, examples), EXAMPLES, RESULT)

    exported = load_tokenizer(str(tmp_path / "out"))
    assert exported.chat_template == FOLD_SYSTEM + FORMATS["gemma"].template
    check_chat(exported)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == end_of_turn(folded) != folded.eos_token_id


def test_examples_without_a_tokenizer_are_exported_with_that_of_the_model(init, tmp_path):
    assert job(init, tmp_path).tokenizer_source == str(init)


def job(init, examples):
    return TrainJob(
        config=TrainConfig(),
        examples_dir=examples,
        init=str(init),
        dtype="float32",
        output_dir=examples / "out",
        work_dir=examples / "work",
        seed=0,
        name="arm",
    )
