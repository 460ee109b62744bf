"""Masked loss: hand-computed values, the label shift, and invariance to how a step is divided."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.config import ScratchConfig
from step_ray.training.batching import collate
from step_ray.training.headloss import find_head, trained_nll
from step_ray.training.layout import choose_layout
from step_ray.training.loss import masked_loss, num_trained_per_row, trained_positions
from step_ray.training.student import new_model, train_tokenizer
from tests.tiny_models import make_examples

SHAPE = ScratchConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def model():
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    return new_model(tokenizer, SHAPE, max_length=64, seed=0)


def nll(model, ids, positions, targets, **inputs):
    head = find_head(model, chunk=2, device=torch.device("cpu"))
    where, what = torch.tensor(positions), torch.tensor(targets)
    return trained_nll(model, head, {"input_ids": torch.tensor(ids), **inputs}, where, what)


def test_loss_is_the_mean_over_the_trained_tokens_of_the_whole_step():
    first, second = torch.tensor(math.log(4)), torch.tensor(math.log(2))
    assert masked_loss(first + second, num_trained=2).item() == pytest.approx(math.log(8) / 2)
    assert masked_loss(second, num_trained=10).item() == pytest.approx(math.log(2) / 10)


def test_a_step_without_trained_tokens_has_loss_zero():
    assert masked_loss(torch.tensor(0.0), num_trained=0).item() == 0.0


def test_the_sum_over_trained_tokens_is_that_of_the_models_log_probabilities(model):
    logs = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    expected = -(logs[0, 6] + logs[1, 7])
    torch.testing.assert_close(nll(model, [[5, 6, 7]], [0, 1], [6, 7]), expected)


def test_a_token_is_predicted_one_position_before_it():
    ids = torch.tensor([[11, 12, 13], [21, 22, 23]])
    mask = torch.tensor([[False, True, False], [True, False, True]])
    positions, targets = trained_positions(ids, mask)
    assert positions.tolist() == [0, 4]  # the mask of token 21 has no position before it
    assert targets.tolist() == [12, 23]


def test_counting_trained_tokens_leaves_out_the_first_token_of_each_row():
    mask = torch.tensor([True, True, False, True, True])
    counts = num_trained_per_row(mask, torch.tensor([0, 3]), torch.tensor([3, 2]))
    assert counts.tolist() == [1, 1]


def test_padding_does_not_change_the_loss(model):
    short = nll(model, [[5, 6]], [0], [6])
    torch.testing.assert_close(nll(model, [[5, 6, 0, 0, 0]], [0], [6]), short)


def step_gradient(model, examples, passes, packed):
    """Loss and gradient of one step that is divided into `passes`."""
    model.zero_grad()
    num_trained = int(examples.num_trained.sum())
    head = find_head(model, chunk=2, device=torch.device("cpu"))
    total = 0.0
    for indices in passes:
        batch = collate(examples, indices, packed=packed)
        sums = trained_nll(model, head, batch.inputs, batch.positions_N, batch.targets_N)
        loss = masked_loss(sums, num_trained)
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters()]


@settings(max_examples=15, deadline=None)
@given(owners=st.lists(st.integers(0, 2), min_size=5, max_size=5))
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradient_do_not_depend_on_the_division_of_the_step(model, packed, owners):
    rows = [
        ([5, 6, 7, 8], [False, False, True, True]),
        ([9, 10], [False, True]),
        ([11, 12, 13, 14, 15, 16], [False, True, True, False, False, True]),
        ([17, 18, 19], [False, False, False]),
        ([20], [True]),
    ]
    examples = make_examples(rows)
    passes = [[i for i, owner in enumerate(owners) if owner == part] for part in range(3)]
    model.set_attn_implementation("sdpa")
    whole_loss, whole_gradient = step_gradient(model, examples, [[0, 1, 2, 3, 4]], packed=False)
    if packed:
        choose_layout(model, model, "packed", device=torch.device("cpu"))
    loss, gradient = step_gradient(model, examples, passes, packed)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
