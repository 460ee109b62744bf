"""Packed examples train like examples alone, or the model is not packed."""

import pytest
import torch
import transformers

from step_ray.errors import ConfigError
from step_ray.training.attention import DOCUMENTS
from step_ray.training.batching import collate, packed_inputs
from step_ray.training.headloss import find_head, trained_nll
from step_ray.training.layout import choose_layout
from tests.tiny_models import CONFIGS, CPU, VOCAB, make_examples, new_model

DOCUMENTS_OF_ATTENTION = set(CONFIGS) - {"gemma2"}
"""The others have an attention that only the mask of transformers packs."""
LENGTHS = (9, 6, 1, 12)


def new_examples():
    """Four documents, of which every third token is trained, the first ones too."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in LENGTHS]
    return make_examples([(row, [i % 3 == 0 for i in range(len(row))]) for row in ids])


def loss_and_gradients(model, batch):
    model.zero_grad()
    head = find_head(model, chunk=3, device=CPU)
    loss = trained_nll(model, head, batch.inputs, batch.positions_N, batch.targets_N)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_and_unpacked_losses_and_gradients_agree(name):
    model, examples = new_model(CONFIGS[name]), new_examples()
    everything = range(len(LENGTHS))
    expected = loss_and_gradients(model, collate(examples, everything))
    layout = choose_layout(model, model, "packed", device=CPU)
    packed = collate(examples, everything, packed=True)
    assert packed.inputs["input_ids"].shape == (1, sum(LENGTHS))
    assert (layout.attention == DOCUMENTS) == (name in DOCUMENTS_OF_ATTENTION)
    torch.testing.assert_close(loss_and_gradients(model, packed), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_and_no_change_crosses_from_one_document_to_another(name):
    model = new_model(CONFIGS[name]).eval()
    choose_layout(model, model, "packed", device=CPU)
    inputs = packed_inputs(torch.tensor([9, 6, 12]))
    embed = model.get_input_embeddings()
    ids = torch.arange(27)[None] + 5
    vectors = embed(ids).detach().requires_grad_()
    logits = model(inputs_embeds=vectors, use_cache=False, **inputs).logits[0]
    logits[9:15].square().sum().backward()
    assert vectors.grad[0, 9:15].abs().min() > 0
    assert vectors.grad[0, :9].abs().max() == 0
    assert vectors.grad[0, 15:].abs().max() == 0
    ids[0, :9] += 40
    ids[0, 15:] += 40
    changed = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    torch.testing.assert_close(changed[9:15], logits[9:15], rtol=1e-6, atol=1e-6)
    assert (changed[:9] - logits[:9]).abs().min() > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_half_precision_is_no_leak(name):
    model = new_model(CONFIGS[name])
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    assert choose_layout(model, model, "auto", device=CPU, autocast=autocast).packed
    half = new_model(CONFIGS[name]).bfloat16()
    assert choose_layout(half, half, "auto", device=CPU).packed


def test_positions_start_again_in_each_document():
    inputs = packed_inputs(torch.tensor([3, 1, 2]))
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert inputs["max_length_q"] == 3
    model = new_model(CONFIGS["llama"]).eval()
    choose_layout(model, model, "packed", device=CPU)
    twice = model(
        input_ids=torch.tensor([[7, 8, 9, 7, 8, 9]]),
        use_cache=False,
        **packed_inputs(torch.tensor([3, 3])),
    ).logits[0]
    torch.testing.assert_close(twice[3:], twice[:3])


def test_the_first_token_of_a_packed_document_is_never_trained():
    examples = make_examples([([5, 6, 7], [True, False, True]), ([8, 9], [True, True])])
    batch = collate(examples, [0, 1], packed=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions_N.tolist() == [1, 3]
    assert batch.targets_N.tolist() == [7, 9]


def test_an_empty_packed_pass_has_no_trained_token_and_a_gradient():
    model = new_model(CONFIGS["llama"])
    choose_layout(model, model, "packed", device=CPU)
    loss, gradients = loss_and_gradients(model, collate(new_examples(), [], packed=True))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


MAMBA = transformers.MambaConfig(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4
)


def test_a_model_whose_state_runs_on_is_padded_and_the_reason_said():
    model = new_model(MAMBA)
    layout = choose_layout(model, model, "auto", device=CPU)
    assert not layout.packed
    assert "a document sees the one before it" in str(layout)
    half = new_model(MAMBA).bfloat16()
    assert not choose_layout(half, half, "auto", device=CPU).packed
    with pytest.raises(ConfigError, match=r"^train.packing: 'packed' is not right for MambaFor"):
        choose_layout(model, model, "packed", device=CPU)


def test_padding_can_be_asked_for_and_leaves_the_model_as_it_is():
    model = new_model(CONFIGS["llama"])
    layout = choose_layout(model, model, "padded", device=CPU)
    assert str(layout) == "batches are padded, attention sdpa (train.packing: padded)"
