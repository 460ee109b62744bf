"""Learning rates, arithmetic of a step, and settings of a training: numbers worked out by hand."""

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from step_ray.config import TrainConfig
from step_ray.training.flops import Shape, peak_flops, shape_of, step_flops
from step_ray.training.schedule import learning_rate


def rates(num_steps, **config):
    settings = TrainConfig(learning_rate=1.0, **config)
    return [round(learning_rate(step, num_steps, settings), 4) for step in range(num_steps)]


def test_a_cosine_rises_to_the_peak_and_ends_at_its_share():
    assert rates(6, warmup_fraction=0.3, final_lr_share=0.2) == [0.5, 1.0, 1.0, 0.8, 0.4, 0.2]


def test_a_constant_schedule_stays_at_the_peak_after_the_warm_up():
    assert rates(5, schedule="constant", warmup_fraction=0.4) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_one_step_without_warm_up_has_the_peak():
    assert rates(1, warmup_fraction=0.0) == [1.0]


def llama(tied, **fields):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=10,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tie_word_embeddings=tied,
            **fields,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_counts_matrices_apart_from_embeddings(tied):
    # per layer: q 8x8, k and v 8x4, o 8x8, and 3 of 8x16
    layer = 64 + 32 + 32 + 64 + 3 * 128
    assert shape_of(llama(tied)) == Shape(
        body=3 * layer, trained_body=3 * layer, head=80, trains_head=True, attention_width=24
    )


def test_a_mixture_of_experts_has_no_shape():
    config = MixtralConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    assert shape_of(MixtralForCausalLM(config)) is None


def test_the_arithmetic_of_a_step_is_that_of_its_tokens_targets_and_texts():
    shape = Shape(body=100, trained_body=100, head=10, trains_head=True, attention_width=2)
    # 6 x 100 x 7 tokens, 6 x 10 x 3 targets, 6 x 2 x (16 + 9)
    assert step_flops(shape, [4, 3], 3) == 4200 + 180 + 300


def test_frozen_weights_need_no_gradient_of_their_own():
    shape = Shape(body=100, trained_body=10, head=10, trains_head=False, attention_width=0)
    assert step_flops(shape, [7], 3) == 7 * (400 + 20) + 3 * 40


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(("given", "least", "most"), [(3, 3, 3), ((1, 4), 1, 4), ([2, 2], 2, 2)])
def test_workers_are_a_number_or_a_range(given, least, most):
    config = TrainConfig(num_workers=given)
    assert (config.least_workers, config.most_workers) == (least, most)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0}, "1 or more"),
        ({"num_workers": (2, 1)}, "least, most"),
        ({"num_workers": (0, 1)}, "1 or more"),
        ({"export": "adapter"}, "set lora_rank"),
        ({"lora_targets": ()}, "names no module"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"schedule": "linear"}, "'cosine' or 'constant'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**settings)
