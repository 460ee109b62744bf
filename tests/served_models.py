"""Tiny random models that give varied text, and what they say without any server."""

import torch

from step_ray.config import ScratchConfig
from step_ray.render import Renderer
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.training.student import (
    load_model,
    load_tokenizer,
    new_model,
    save_student,
    train_tokenizer,
)
from step_ray.types import Message

MAX_LENGTH = 256
SHAPE = ScratchConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2)


def save_varied_model(folder, seed):
    """Save a model whose answers depend on the prompt and on the seed."""
    tokenizer = train_tokenizer(["You are in the middle of a room."], SHAPE.vocab_size)
    model = new_model(tokenizer, SHAPE, max_length=MAX_LENGTH, seed=seed)
    torch.manual_seed(seed)
    for layer in model.model.layers:
        for weight in layer.self_attn.parameters():
            torch.nn.init.normal_(weight, std=0.4)
    model.lm_head = torch.nn.Linear(SHAPE.hidden_size, len(tokenizer), bias=False)
    model.config.tie_word_embeddings = False
    save_student(folder, model, tokenizer)
    return str(folder)


def expected(folder, text, max_tokens=12):
    """The prompt of a question and the answer to it."""
    tokenizer = load_tokenizer(folder)
    generator = BatchGenerator(load_model(folder, "float32"), tokenizer, max_length=MAX_LENGTH)
    prompt = Renderer(tokenizer, MAX_LENGTH).render_prompt([Message(role="user", content=text)])
    (got,) = generator.generate([prompt], [SamplingParams(max_tokens=max_tokens)])
    return prompt, got
