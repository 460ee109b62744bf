"""Validation without a cluster: the numbers are those of the plain log probabilities."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from step_ray.config import ScratchConfig, TrainConfig
from step_ray.errors import DataError
from step_ray.training.learner import Learner
from step_ray.training.student import new_model, save_student, train_tokenizer
from step_ray.training.validation import Validation

SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)
IDS = [[9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33]]
TRAINED = [[0, 0, 0, 1, 1], [0, 1, 1], [0, 0, 0, 1]]
ERRORS = [[0, 1, 1, 0, 0], [0, 0, 0], [0, 0, 1, 0]]
TYPES = {"input_ids": pa.int32(), "loss_mask": pa.bool_(), "error_mask": pa.bool_()}


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    save_student(folder, new_model(tokenizer, SHAPE, max_length=64, seed=0), tokenizer)
    return Learner(
        init=str(folder),
        dtype="float32",
        config=TrainConfig(micro_batch_tokens=64),
        seed=0,
        device=torch.device("cpu"),
    )


def write(folder, errors):
    masks = [[[bool(x) for x in row] for row in mask] for mask in (TRAINED, errors)]
    columns = dict(zip(TYPES, [IDS, *masks], strict=True))
    schema = pa.schema({name: pa.list_(kind) for name, kind in TYPES.items()})
    pq.write_table(pa.table(columns, schema=schema), folder / "examples.parquet")
    return folder


def plain_mean(model, mask):
    """Mean negative log probability of the masked tokens, one text at a time."""
    model.set_attn_implementation("sdpa")  # one text alone is not packed
    values = []
    for ids, flags in zip(IDS, mask, strict=True):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values += [-log_probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if flags[t]]
    return sum(values) / len(values)


def test_the_means_are_over_trained_and_over_error_tokens(tmp_path, learner):
    numbers = Validation(write(tmp_path, ERRORS)).measure(learner)

    plain = AutoModelForCausalLM.from_pretrained(learner.init)
    assert numbers["validation_loss"] == pytest.approx(plain_mean(plain, TRAINED), rel=1e-5)
    assert numbers["error_nll"] == pytest.approx(plain_mean(plain, ERRORS), rel=1e-5)


def test_a_validation_leaves_the_model_in_training_mode_and_without_gradients(tmp_path, learner):
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    Validation(write(tmp_path, ERRORS)).measure(learner)

    assert learner.model.training
    assert all(p.grad is None for p in learner.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in learner.model.named_parameters())


def test_without_error_tokens_there_is_no_error_nll(tmp_path, learner):
    for number, errors in enumerate(([[0] * len(row) for row in IDS], [[], [], []])):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert "error_nll" not in Validation(write(folder, errors)).measure(learner)


def test_error_masks_of_another_length_are_refused(tmp_path):
    with pytest.raises(DataError, match="error masks of another length"):
        Validation(write(tmp_path, [[0, 1], [0], [1]]))


def test_examples_without_error_masks_are_refused(tmp_path):
    columns = {"input_ids": IDS, "loss_mask": [[bool(x) for x in row] for row in TRAINED]}
    pq.write_table(pa.table(columns), tmp_path / "examples.parquet")
    with pytest.raises(DataError, match=r"validation: .* cannot be read"):
        Validation(tmp_path)
