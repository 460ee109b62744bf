"""One optimizer step is the same however it is divided: over passes, over ranks, packed or not."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from step_ray.config import TrainConfig
from step_ray.training.learner import Learner
from step_ray.training.student import train_tokenizer
from tests.tiny_models import CPU, SHAPE, VOCAB, make_examples, new_model

NUM = 8
LENGTH = 32
ALL_AT_ONCE, FOUR_AT_ONCE = NUM * LENGTH, NUM * LENGTH // 2
LAYOUTS = ("padded", "packed")
ON_RANKS = {
    "ddp padded": {"strategy": "ddp", "packing": "padded"},
    "ddp packed": {"strategy": "ddp", "packing": "packed"},
    "fsdp2 padded": {"strategy": "fsdp2", "packing": "padded"},
    "fsdp2 packed": {"strategy": "fsdp2", "packing": "packed"},
    "fsdp2 packed, LoRA": {"strategy": "fsdp2", "packing": "packed", "lora_rank": 2},
    "ddp clipped": {"strategy": "ddp", "max_grad_norm": 0.01},
    "fsdp2 clipped": {"strategy": "fsdp2", "max_grad_norm": 0.01},
}


def examples():
    """Eight of the same length; the first trains one token, the second none, the last eleven."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.randint(3, VOCAB, (NUM, LENGTH), generator=draw).tolist()
    trained = [1, 0, 3, 2, 7, 5, 2, 11]
    masks = [[i >= LENGTH - n for i in range(LENGTH)] for n in trained]
    return make_examples(list(zip(rows, masks, strict=True)))


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A model folder; the head is tied, so that it is trained from two sides."""
    folder = tmp_path_factory.mktemp("model")
    new_model(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(folder)
    train_tokenizer(["go"], 300).save_pretrained(folder)
    return str(folder)


def train_step(init, *, held_out_first=False, **changes):
    """Loss and weights after one step of plain descent, which does not hide a wrong scale."""
    fields = {"max_grad_norm": 1e9, "loss_chunk": 3, "batch_tokens": NUM * LENGTH}
    config = TrainConfig(**{**fields, **changes})
    learner = Learner(init=init, dtype="float32", config=config, seed=0, device=CPU)
    trained = [p for p in learner.model.parameters() if p.requires_grad]
    learner.optimizer = torch.optim.SGD(trained, lr=0.1)
    if held_out_first:
        learner.nll(learner.passes(examples(), range(NUM)))
    line = learner.train_batch(examples(), range(NUM), number=0, lr=0.1)
    state = get_model_state_dict(learner.model, options=StateDictOptions(full_state_dict=True))
    return line, state, learner


def on_one_of_two_ranks(rank, init, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, settings in ON_RANKS.items():
        line, state, _ = train_step(
            init, micro_batch_tokens=2 * LENGTH, held_out_first=True, **settings
        )
        if rank == 0:
            torch.save((line["loss"], state), Path(folder) / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(init, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(
        on_one_of_two_ranks, args=(init, str(folder)), nprocs=2, start_method="spawn"
    )
    return folder


def assert_same_update(result, expected):
    loss, state = result
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert state.keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(state[name], weight, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def all_at_once(init):
    line, state, _ = train_step(init, micro_batch_tokens=ALL_AT_ONCE, packing="padded")
    return line["loss"], state


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packing", LAYOUTS)
def test_two_passes_of_four_examples_are_one_pass_of_eight(init, all_at_once, packing, recompute):
    config = {"packing": packing, "gradient_checkpointing": recompute}
    line, state, learner = train_step(init, micro_batch_tokens=FOUR_AT_ONCE, **config)
    assert len(learner.passes(examples(), range(NUM))) == 2
    assert_same_update((line["loss"], state), all_at_once)


@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_with_uneven_masks_make_the_update_of_one(init, two_ranks, all_at_once, name):
    expected = all_at_once
    changes = {"LoRA": {"lora_rank": 2}, "clipped": {"max_grad_norm": 0.01}}
    settings = next((changes[word] for word in changes if word in name), None)
    if settings:
        line, state, _ = train_step(
            init, micro_batch_tokens=ALL_AT_ONCE, packing="padded", **settings
        )
        expected = line["loss"], state
    assert_same_update(torch.load(two_ranks / f"{name}.pt"), expected)


def test_a_gradient_that_is_too_long_is_cut_to_the_limit_and_told_as_it_was(init):
    before = transformers.AutoModelForCausalLM.from_pretrained(init).state_dict()
    line, after, _ = train_step(init, micro_batch_tokens=ALL_AT_ONCE, max_grad_norm=0.01)
    names = before.keys() - {"lm_head.weight"}  # it is tied to the embedding
    moved = sum((after[name] - before[name]).square().sum() for name in names)
    assert line["grad_norm"] > 0.1
    assert moved.sqrt().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_step_reports_what_it_was_made_of(init):
    line, _, learner = train_step(init, micro_batch_tokens=ALL_AT_ONCE)
    assert line["tokens"] == 256
    assert line["trained_tokens"] == 31
    assert line["padding_share"] == 0
    assert str(learner.layout).startswith("batches are packed, attention step_ray_documents")
    assert str(learner.head) == "logits of 3 trained tokens at a time"


def test_held_out_loss_leaves_the_weights_and_counts_the_same_tokens(init):
    line, _, _ = train_step(init, micro_batch_tokens=ALL_AT_ONCE)
    config = TrainConfig(micro_batch_tokens=ALL_AT_ONCE, loss_chunk=3)
    learner = Learner(init=init, dtype="float32", config=config, seed=0, device=CPU)
    passes = learner.passes(examples(), range(NUM))
    assert learner.nll(passes) / 31 == pytest.approx(line["loss"], rel=1e-5)
    assert learner.model.training
    assert all(p.grad is None for p in learner.model.parameters())
