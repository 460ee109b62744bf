"""Tiny models of real architectures with random weights, and examples made by hand."""

import copy

import torch
import transformers
from transformers import AutoModelForCausalLM

from step_ray.training.batching import Examples
from step_ray.training.loss import num_trained_per_row

CPU = torch.device("cpu")
VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
WINDOW = 4
"""Shorter than the documents, so that a sliding window matters."""
CONFIGS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen2, some layers slide": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=8),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "gemma2": transformers.Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=2.0
    ),
}


def new_model(config):
    """Weights so large that attention matters: a leak of any size shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


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
