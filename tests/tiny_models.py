"""Tiny models of real architectures with random weights, and examples made by hand."""

import copy
import random

import torch
import transformers
from transformers import AutoModelForCausalLM

from step_ray.config import ScratchConfig
from step_ray.training import student
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


WRITER = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)


def writer_tokenizer():
    return student.train_tokenizer(["Thought: I look around.\nAction: go to desk 1"], 300)


def new_writer(tokenizer, max_length):
    """A model whose greedy text varies and depends on what is far behind: tied random weights only
    repeat the last token."""
    model = student.new_model(tokenizer, WRITER, max_length=max_length, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.self_attn.parameters():
                weight.normal_(std=0.4)
    model.lm_head = torch.nn.Linear(WRITER.hidden_size, len(tokenizer), bias=False)
    return model


def random_prompts(*lengths):
    rng = random.Random(0)
    return [[rng.randrange(7, 260) for _ in range(length)] for length in lengths]


def hf_greedy(model, prompt, max_tokens):
    """What transformers writes after a prompt."""
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        out = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
        )
    return tuple(out[0, len(prompt) :].tolist())
