"""Masked loss: hand-computed values, the label shift, and invariance to how a step is divided."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_ray.batching import Examples, collate
from step_ray.config import ScratchConfig
from step_ray.loss import masked_loss, num_trained_per_row, trained_logits, trained_positions
from step_ray.student import new_model, train_tokenizer

SHAPE = ScratchConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2)


def make_examples(rows):
    """Examples of (ids, mask) pairs."""
    ids = torch.tensor([i for row, _ in rows for i in row], dtype=torch.int32)
    mask = torch.tensor([m for _, row in rows for m in row], dtype=torch.bool)
    lengths = torch.tensor([len(row) for row, _ in rows])
    starts = lengths.cumsum(0) - lengths
    return Examples(
        input_ids=ids,
        loss_mask=mask,
        starts=starts,
        lengths=lengths,
        num_trained=num_trained_per_row(mask, starts, lengths),
    )


@pytest.fixture(scope="module")
def model():
    tokenizer = train_tokenizer(["go to shelf 1"], SHAPE.vocab_size)
    return new_model(tokenizer, SHAPE, max_length=64, seed=0)


def test_loss_is_the_mean_negative_log_probability_of_the_trained_tokens():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])  # p = (1/4, 3/4) and (1/2, 1/2)
    loss = masked_loss(logits, torch.tensor([0, 1]), num_trained=2)
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_loss_divides_by_the_trained_tokens_of_the_whole_step():
    logits = torch.zeros(1, 2)
    assert masked_loss(logits, torch.tensor([1]), num_trained=10).item() == pytest.approx(
        math.log(2) / 10
    )


def test_micro_batch_without_trained_tokens_gives_zero_with_a_gradient():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = masked_loss(logits, torch.zeros(0, dtype=torch.long), num_trained=0)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


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


def test_selected_logits_equal_those_of_the_full_forward_pass(model):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    full = model(input_ids=ids).logits.flatten(0, 1)
    positions = torch.tensor([0, 2, 5])
    selected = trained_logits(model, model.get_output_embeddings(), ids, positions)
    torch.testing.assert_close(selected, full[positions])


def test_padding_does_not_change_the_logits(model):
    head, positions = model.get_output_embeddings(), torch.tensor([1])
    short = trained_logits(model, head, torch.tensor([[5, 6]]), positions)
    padded = trained_logits(model, head, torch.tensor([[5, 6, 0, 0, 0]]), positions)
    torch.testing.assert_close(short, padded)


def step_gradient(model, examples, passes):
    """Loss and gradient of one step that is divided into `passes`."""
    model.zero_grad()
    num_trained = int(examples.num_trained.sum())
    total = 0.0
    for indices in passes:
        batch = collate(examples, indices)
        logits = trained_logits(
            model, model.get_output_embeddings(), batch.input_ids_BT, batch.positions_N
        )
        loss = masked_loss(logits, batch.targets_N, num_trained)
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters()]


@settings(max_examples=15, deadline=None)
@given(owners=st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_loss_and_gradient_do_not_depend_on_the_division_of_the_step(model, owners):
    rows = [
        ([5, 6, 7, 8], [False, False, True, True]),
        ([9, 10], [False, True]),
        ([11, 12, 13, 14, 15, 16], [False, True, True, False, False, True]),
        ([17, 18, 19], [False, False, False]),
        ([20], [True]),
    ]
    examples = make_examples(rows)
    passes = [[i for i, owner in enumerate(owners) if owner == part] for part in range(3)]
    whole_loss, whole_gradient = step_gradient(model, examples, [[0, 1, 2, 3, 4]])
    loss, gradient = step_gradient(model, examples, passes)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
