"""Memory of each rank of an FSDP2 training: loading, a step, a checkpoint, the export.

A Llama with random weights lies in a folder in bfloat16 and is trained in float32, as large models
are (`train.autocast: bfloat16`). Each rank is a process of its own. Once every rank reads the whole
model, which FSDP2 then cuts (`each`), and once rank 0 reads it and hands out shares, as step_ray
does (`shares`). Figures are the most resident memory of a process above what it had before, in MiB
and as multiples of the float32 weights. Both ways must hold the same weights.

Run: `python tests/bench/bench_loading.py [--ranks 2] [--layers 20] [--lora-rank 16]`
"""

import argparse
import hashlib
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sft_sides import status
from transformers import LlamaConfig, LlamaForCausalLM

from step_ray.config import TrainConfig
from step_ray.dataset import Example, write_examples
from step_ray.training import learner as learner_module
from step_ray.training import state as train_state
from step_ray.training.batching import load_examples
from step_ray.training.export import export
from step_ray.training.job import TrainJob, TrainResult
from step_ray.training.learner import Learner
from step_ray.training.student import train_tokenizer
from step_ray.training.trainee import build_model, make_trainee, shard

CPU = torch.device("cpu")
WAYS = ("each", "shares")
RESULT = TrainResult(
    num_steps=1, final_loss=0.0, trained_tokens=1, seconds=1.0, tokens_per_s=1.0, num_restarts=0
)


def main() -> None:
    args = parse()
    # freed memory goes back to the system at once, else the figures are those of malloc
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    with tempfile.TemporaryDirectory(prefix="bench_loading_") as name:
        folder = Path(name)
        weights = prepare(folder, args)
        print(f"{weights:.0f} MiB of float32 weights, {args.ranks} ranks")
        digests = set()
        for way in WAYS:
            mp.start_processes(
                measure, (way, args, folder), nprocs=args.ranks, start_method="spawn"
            )
            for rank in range(args.ranks):
                found = torch.load(folder / f"{way}-{rank}.pt")
                digests.add((rank, found.pop("digest")))
                print(f"{way:>7} rank {rank}: " + line_of(found, weights), flush=True)
    assert len(digests) == args.ranks, "the two ways do not hold the same weights"
    print("the shares of each rank are the same, bit for bit, both ways")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--lora-rank", type=int, default=0)
    return parser.parse_args()


def prepare(folder: Path, args: argparse.Namespace) -> float:
    """Write a model and an example; gives MiB of the weights."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        vocab_size=args.vocab,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    # several files, as large models have
    model.save_pretrained(folder / "model", max_shard_size="200MB")
    train_tokenizer(["go to shelf 1"], 300).save_pretrained(folder / "model")
    mask = (False, True, True, True)
    row = Example(trajectory_id="t", source="expert", input_ids=(5, 6, 7, 8), loss_mask=mask)
    write_examples(folder / "examples", [row])
    return sum(p.numel() for p in model.parameters()) * 4 / 2**20


def measure(rank: int, way: str, args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/{way}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.ranks)
    config = TrainConfig(strategy="fsdp2", autocast="bfloat16", lora_rank=args.lora_rank)
    found: dict = {}
    read = make_trainee if way == "shares" else read_by_each
    learner_module.make_trainee = partial(measured, read, found)
    job = job_of(folder, config)
    learner = Learner(init=job.init, dtype=job.dtype, config=config, seed=job.seed, device=CPU)
    found["digest"] = digest(learner)
    examples = load_examples(job.examples_dir)
    with Peak(found, "step"):
        learner.train_batch(examples, [0], number=0, lr=1e-4)
    with Peak(found, "checkpoint"):
        train_state.save(learner, str(folder / f"{way}-checkpoint"), 1)
    with Peak(found, "restore"):
        train_state.restore(learner, str(folder / f"{way}-checkpoint"))
    with Peak(found, "export"):
        export(learner, folder / "out", job, examples, RESULT)
        dist.barrier()
    torch.save(found, folder / f"{way}-{rank}.pt")
    dist.destroy_process_group()


def measured(read, found: dict, *args):
    """Only reading, without the trial passes that follow."""
    with Peak(found, "load"):
        return read(*args)


def job_of(folder: Path, config: TrainConfig) -> TrainJob:
    return TrainJob(
        config=config,
        examples_dir=folder / "examples",
        init=str(folder / "model"),
        dtype="bfloat16",
        output_dir=folder / "out",
        work_dir=folder,
        seed=0,
        name="bench",
    )


def read_by_each(init, dtype, config, seed, device):
    """How FSDP2 is often used: the whole model on every rank, and then cut."""
    model = build_model(init, dtype, config, seed)
    shard(model, config, device)
    return model, model


def digest(learner: Learner) -> str:
    state = hashlib.sha256()
    for parameter in learner.model.parameters():
        state.update(parameter.to_local().detach().contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


class Peak:
    """Notes seconds, and memory at the most and at the end above the start, of a block."""

    def __init__(self, found: dict, name: str) -> None:
        self.found, self.name = found, name

    def __enter__(self) -> None:
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.begun, self.before = time.monotonic(), status("VmRSS")

    def __exit__(self, *_: object) -> None:
        self.found[self.name] = {
            "peak": status("VmHWM") - self.before,
            "kept": status("VmRSS") - self.before,
            "seconds": time.monotonic() - self.begun,
        }


def line_of(found: dict, weights: float) -> str:
    parts = [
        f"{name} {one['peak']:.0f} MiB ({one['peak'] / weights:.2f}x, {one['seconds']:.1f} s)"
        for name, one in found.items()
    ]
    return f"{', '.join(parts)}; after loading {found['load']['kept'] / weights:.2f}x"


if __name__ == "__main__":
    main()
