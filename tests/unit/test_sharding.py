"""Loading in shards and gathering: two ranks hold the very model that one would read."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from step_ray.config import TrainConfig
from step_ray.errors import ConfigError
from step_ray.training import sharding
from step_ray.training.sharding import gather, load_in_shards
from step_ray.training.trainee import build_model, make_trainee, shard
from tests.tiny_models import CONFIGS, CPU, SHAPE, VOCAB, new_model

TIED = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)
MODELS = {
    **{name: CONFIGS[name] for name in ("llama", "qwen2", "gemma2")},
    "tied": TIED,
    "tied by config only": TIED,  # see `inits`
    "gpt2": transformers.GPT2Config(
        **{"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
    "long rope": transformers.LlamaConfig(
        **SHAPE,
        rope_parameters={
            **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    ),
}
LORA = {"lora_rank": 4}
CASES = {
    **{name: (name, "float32", {}) for name in MODELS},
    "LoRA in bfloat16": ("tied", "bfloat16", LORA),
    "bfloat16 on float32 weights": ("llama", "bfloat16", {"autocast": "bfloat16"}),
    "checkpointing": ("llama", "float32", {"gradient_checkpointing": True}),
}
IDS = torch.arange(24)[None] * 5 % VOCAB


@pytest.fixture(scope="module")
def inits(tmp_path_factory):
    """A folder per model. Where only the config ties, the file has a head of its own."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        new_model(config).save_pretrained(folder / name)
    file = folder / "tied by config only" / "model.safetensors"
    weights = load_file(file)
    head = torch.flip(weights["model.embed_tokens.weight"], dims=(0,)).contiguous()
    save_file({**weights, "lm_head.weight": head}, file, metadata={"format": "pt"})
    return folder


def settings_of(name, inits):
    model, dtype, changes = CASES[name]
    return str(inits / model), dtype, TrainConfig(strategy="fsdp2", **changes)


def ties(model):
    """Pairs of names of one weight."""
    weights = list(model.named_parameters(remove_duplicate=False))
    return {(a, b) for a, one in weights for b, other in weights if a < b and one is other}


def facts(model):
    """All that makes a model, with whole weights."""
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named(model)}
    return {
        "weights": {name: weight.detach().clone() for name, weight in weights.items()},
        "trained": {name: p.requires_grad for name, p in named(model)},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "ties": ties(model),
    }


def named(model):
    return list(model.named_parameters())


def loss_and_gradient(model):
    """A first loss in evaluation mode, and the whole gradient of all trained weights."""
    loss = model.eval()(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad for n, p in named(model) if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return loss.detach(), whole


def as_before(init, dtype, config):
    """Every rank reads the whole model, and FSDP2 cuts it."""
    model = build_model(init, dtype, config, seed=0)
    shard(model, config, CPU)
    return model


def on_one_of_two_ranks(rank, inits, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counted = count_calls(sharding, "_weights_of")
    for name in CASES:
        given = settings_of(name, inits)
        model, trained = make_trainee(*given, 0, CPU)
        assert model is trained
        seen = {"facts": facts(model), "first": loss_and_gradient(model), "ties": ties(model)}
        seen["local"] = sum(p.to_local().numel() for p in model.parameters())
        seen["before"] = loss_and_gradient(as_before(*given))
        target = None if rank else build_model(*given, seed=1)
        gather(model, target)
        seen["gathered"] = None if rank else facts(target)["weights"]
        torch.save(seen, Path(folder) / f"{name}-{rank}.pt")
    torch.save(len(counted), Path(folder) / f"reads-{rank}.pt")
    with pytest.raises(ConfigError) as caught:
        load_in_shards(refuse, refuse, refuse, CPU)
    torch.save(str(caught.value), Path(folder) / f"fault-{rank}.pt")
    dist.destroy_process_group()


def count_calls(module, name):
    """Calls of a function of a module, which still does what it does."""
    calls, real = [], getattr(module, name)
    setattr(module, name, lambda *args: (calls.append(args), real(*args))[1])
    return calls


def refuse(*_):
    raise ConfigError(f"student.init: not readable, says rank {dist.get_rank()}")


@pytest.fixture(scope="module")
def ranks(inits, tmp_path_factory):
    """What both ranks have seen, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(
        on_one_of_two_ranks, args=(inits, str(folder)), nprocs=2, start_method="spawn"
    )
    return folder


def seen_by(ranks, name, rank):
    return torch.load(ranks / f"{name}-{rank}.pt")


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_hold_the_weights_buffers_types_and_ties_of_the_file(inits, ranks, name):
    expected = facts(build_model(*settings_of(name, inits), seed=0))
    for rank in (0, 1):
        found = seen_by(ranks, name, rank)
        for kind in ("weights", "buffers"):
            torch.testing.assert_close(found["facts"][kind], expected[kind], rtol=0, atol=0)
        assert found["facts"]["trained"] == expected["trained"]
        # after a pass forward and backward too: FSDP2 swaps weights
        assert found["facts"]["ties"] == found["ties"] == expected["ties"]


@pytest.mark.parametrize("name", CASES)
def test_first_loss_and_gradient_are_those_of_a_model_read_by_every_rank(ranks, name):
    for rank in (0, 1):
        found = seen_by(ranks, name, rank)
        (loss, grads), (loss_before, grads_before) = found["first"], found["before"]
        assert loss.isfinite() and loss == loss_before
        torch.testing.assert_close(grads, grads_before, rtol=0, atol=0)


def test_a_tied_weight_gets_the_gradient_of_both_its_uses(inits, ranks):
    expected = loss_and_gradient(build_model(*settings_of("tied", inits), seed=0))
    loss, grads = seen_by(ranks, "tied", 1)["first"]
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grads, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gathered_weights_are_those_that_were_handed_out(ranks, name):
    found = seen_by(ranks, name, 0)
    torch.testing.assert_close(found["gathered"], found["facts"]["weights"], rtol=0, atol=0)


def test_weights_of_two_ranks_are_split_about_evenly_and_only_the_first_reads(ranks):
    parts = [seen_by(ranks, "llama", rank)["local"] for rank in (0, 1)]
    whole = sum(p.numel() for p in new_model(copy.deepcopy(MODELS["llama"])).parameters())
    assert sum(parts) == whole
    assert max(parts) < 0.51 * whole
    assert [torch.load(ranks / f"reads-{rank}.pt") for rank in (0, 1)] == [len(CASES), 0]


def test_a_fault_of_the_reading_rank_is_raised_on_all(ranks):
    faults = {torch.load(ranks / f"fault-{rank}.pt") for rank in (0, 1)}
    assert faults == {"student.init: not readable, says rank 0"}
