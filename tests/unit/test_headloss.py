"""The chunked loss is the full-logits loss, in value and gradient, with a chunk of logits alive."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from step_ray.training.headloss import Head, choose_head, find_head, sum_nll, trained_nll
from tests.tiny_models import CONFIGS, CPU, SHAPE, VOCAB, new_model

IDS = torch.arange(24).view(2, 12) * 7 % VOCAB
POSITIONS = torch.tensor([0, 3, 4, 9, 13, 14, 20])
TARGETS = IDS.flatten()[POSITIONS + 1]
MODELS = {
    "llama": CONFIGS["llama"],
    "tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "bias in the head": transformers.PhiConfig(**SHAPE),
    "soft cap": CONFIGS["gemma2"],
    "logit scale": transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "logits scaling": transformers.GraniteConfig(**SHAPE, logits_scaling=3.0),
}


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def full_loss(model):
    """The plain way: all logits, by the model itself."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[POSITIONS]
    loss = F.cross_entropy(logits.float(), TARGETS, reduction="sum")
    loss.backward()
    return loss.detach(), gradients(model)


def chunked_loss(model, head):
    model.zero_grad()
    loss = trained_nll(model, head, {"input_ids": IDS}, POSITIONS, TARGETS)
    loss.backward()
    return loss.detach(), gradients(model)


def chosen(model, chunk):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return choose_head(model, base, {"input_ids": IDS}, chunk=chunk, device=CPU)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients_are_those_of_the_full_logits(name, chunk):
    model = new_model(MODELS[name])
    expected = full_loss(model)
    head = chosen(model, chunk)
    assert head.chunk == chunk
    torch.testing.assert_close(chunked_loss(model, head), expected, rtol=1e-5, atol=1e-5)


def test_a_lora_on_the_head_is_part_of_the_loss():
    model = get_peft_model(
        new_model(CONFIGS["llama"]), LoraConfig(target_modules=["lm_head", "q_proj"], r=2)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    expected = full_loss(model)
    head = chosen(model, 3)
    assert head.chunk == 3
    assert not head.is_plain
    torch.testing.assert_close(chunked_loss(model, head), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_hands_one_on():
    model = new_model(CONFIGS["llama"])
    model.get_output_embeddings().weight.requires_grad_(False)
    expected = full_loss(model)
    torch.testing.assert_close(chunked_loss(model, chosen(model, 3)), expected)


@pytest.mark.parametrize("name", ["llama", "soft cap"])
def test_autocast_reaches_the_head_and_the_sum_is_that_of_float32(name):
    model = new_model(MODELS[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, whole = full_loss(model)
        head = chosen(model, 3)
        loss, found = chunked_loss(model, head)
    assert head.chunk == 3
    # The soft cap of the model's own forward is in half precision, ours is not.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6 if name == "llama" else 1e-2)
    for one, other in zip(found, whole, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


def test_the_loss_of_half_precision_weights_is_summed_in_float32():
    model = new_model(CONFIGS["llama"]).bfloat16()
    expected, _ = full_loss(model)
    loss, _ = chunked_loss(model, chosen(model, 3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [0, 3])
def test_no_trained_token_gives_zero_with_a_gradient(chunk):
    model = new_model(CONFIGS["llama"])
    nothing = torch.zeros(0, dtype=torch.long)
    head = find_head(model, chunk=3, device=CPU)
    head = Head(module=head.module, chunk=chunk)
    loss = trained_nll(model, head, {"input_ids": IDS}, nothing, nothing)
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model))


def test_a_head_that_does_what_no_config_tells_is_left_to_the_model():
    model = new_model(CONFIGS["llama"])
    forward = model.forward

    def tempered(**kwargs):
        output = forward(**kwargs)
        output.logits = output.logits / 2.5
        return output

    model.forward = tempered
    head = chosen(model, 3)
    assert head.chunk == 0
    assert str(head) == "logits of all trained tokens"
    torch.testing.assert_close(chunked_loss(model, head), full_loss(model), rtol=1e-5, atol=1e-5)


def test_the_chunk_is_derived_from_the_vocabulary():
    model = new_model(CONFIGS["llama"])
    assert find_head(model, chunk=0, device=CPU).chunk == 2**24 // VOCAB
    model.config.vocab_size = 152_000
    assert find_head(model, chunk=0, device=CPU).chunk == 110


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_at_most_a_chunk_of_logits_is_made(softcap):
    num, width, vocab, chunk = 64, 4, 4000, 4
    head = Head(module=torch.nn.Linear(width, vocab), chunk=chunk, softcap=softcap)
    hidden = torch.randn(num, width, requires_grad=True)
    targets = torch.arange(num)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        sum_nll(head, hidden, targets).backward()
    largest = max(event.self_cpu_memory_usage for event in record.events())
    assert largest >= 4 * chunk * vocab
    assert largest < 4 * num * vocab / 2
