"""One side of bench_sft.py in a process of its own: trains the same steps, prints one JSON line.

Run by bench_sft.py, not by hand. The TRL side needs trl and nothing of step_ray.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ["CUDA_VISIBLE_DEVICES"] = "0" if job["cuda"] else ""
    import torch

    torch.set_num_threads(job["threads"])
    side = {"ours": ours, "trl": trl_side}[job["side"]]
    result = side(argparse.Namespace(**job))
    print(json.dumps({"torch": torch.__version__, **result}))


class Meter:
    """Seconds and losses of the steps, and the most memory from `start` on."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.steps: list[dict[str, float]] = []

    def start(self) -> None:
        self.rss_before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def begin(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        cpu = time.process_time() - self.cpu
        self.steps.append({"wall_s": time.perf_counter() - self.wall, "cpu_s": cpu})

    def result(self, losses: list[float], note: str) -> dict:
        peak = status("VmHWM")
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_allocated() / 2**20
        return {
            "steps": self.steps,
            "losses": losses,
            "peak_mib": peak,
            "rss_before_mib": self.rss_before,
            "note": note,
        }


def status(key: str) -> float:
    """A figure of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def ours(job: argparse.Namespace) -> dict:
    import torch

    from step_ray.config import TrainConfig
    from step_ray.training.batching import load_examples
    from step_ray.training.learner import Learner

    assert "ray" not in sys.modules, "the training step must not need Ray"
    packing, *switches = job.mode.split("+")
    settings = {
        "micro_batch_tokens": job.micro_batch_tokens,
        "packing": packing,
        "use_gpu": job.cuda,
        "gradient_checkpointing": job.gradient_checkpointing,
    }
    pairs = (switch.partition("=") for switch in switches)
    config = TrainConfig(**settings | {name: value or True for name, _, value in pairs})
    device = torch.device("cuda" if job.cuda else "cpu")
    examples = load_examples(Path(job.examples))
    learner = Learner(init=job.model, dtype=job.dtype, config=config, seed=0, device=device)
    everything = range(len(examples.lengths))
    meter = Meter(job.cuda)
    meter.start()
    losses = []
    for number in range(job.steps):
        meter.begin()
        line = learner.train_batch(examples, everything, number=number, lr=job.lr)
        meter.end()
        losses.append(line["loss"])
    if job.profile:
        train = partial(learner.train_batch, examples, everything, number=job.steps, lr=job.lr)
        print_shares(train, job.cuda)
    note = f"{learner.layout}; {learner.head}; padding {line['padding_share']:.1%}"
    return meter.result(losses, note)


def print_shares(work: Callable[[], object], cuda: bool) -> None:
    """To stderr: what takes the time of one piece of work, by operation or kernel."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        work()
    clock = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, clock))
    whole = sum(getattr(event, clock) for event in events)
    for event in events[:25]:
        share = getattr(event, clock) / whole
        print(f"{share:6.1%} {event.count:6} times {event.key[:110]}", file=sys.stderr)


def trl_side(job: argparse.Namespace) -> dict:
    import torch
    from datasets import Dataset, disable_progress_bars
    from pyarrow import parquet
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer, pack_dataset

    disable_progress_bars()
    table = parquet.read_table(sorted(Path(job.examples).glob("*.parquet")))
    rows = sorted(table.to_pylist(), key=lambda row: -len(row["input_ids"]))
    data = Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "labels": [
                    token if trained and i else -100
                    for i, (token, trained) in enumerate(
                        zip(row["input_ids"], row["loss_mask"], strict=True)
                    )
                ],
            }
            for row in rows
        ]
    )
    shape, *switches = job.mode.split("+")
    kind, _, size = shape.partition(":")
    packing = kind == "packed"
    max_length = int(size) if packing else None
    per_pass = 1 if packing else int(size)
    num_rows = len(pack_dataset(data, max_length, "bfd")) if packing else len(data)
    attention = next((name for name in switches if "attention" in name), job.trl_attention)
    meter = Meter(job.cuda)

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            meter.begin()

        def on_step_end(self, *args, **kwargs):
            meter.end()

    config = SFTConfig(
        output_dir=str(Path(job.model).parent / "trl"),
        max_steps=job.steps,
        per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=-(-num_rows // per_pass),
        packing=packing,
        max_length=max_length,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=job.gradient_checkpointing,
        use_liger_kernel="liger" in switches,
        torch_compile="compile" in switches,
        bf16=False,
        use_cpu=not job.cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=job.cuda,
        seed=0,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation=attention
    )
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    trainer = SFTTrainer(
        model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
    )
    trainer.log = lambda logs, *args, **kwargs: trainer.state.log_history.append(logs)
    meter.start()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    note = f"{num_rows} rows, {per_pass} a pass, {config.optim}, attention {attention}"
    return meter.result(losses, note)


if __name__ == "__main__":
    main()
