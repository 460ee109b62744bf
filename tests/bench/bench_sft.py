"""Masked SFT against TRL's SFTTrainer: same model, same trajectories, same batch, in one run.

Both sides train one batch of ALFWorld episodes a few times, each in a fresh process: half of them
are the expert's, half a clumsy student's with masked errors and corrections. TRL gets the same
token ids and labels, so that it trains the same tokens (its assistant-only loss knows no masked
turn), its packing, its fused loss and no gradient checkpointing; of the modes given, the fastest
counts.

TRL lives in an environment of its own, with the same torch and transformers:
    python -m venv VENV && VENV/bin/pip install -c constraints.txt -r tests/bench/trl.txt
Run: `python tests/bench/bench_sft.py --trl-python VENV/bin/python [--shape smol]`
On a GPU: `... --device cuda --shape llama-7b --dtype bfloat16 --batch-tokens 65536
    --modes packed packed+compile --trl-attention flash_attention_2 --trl-modes packed:4096`
A machine without Ray and the engines gets the examples from one that has them: `--only-examples
FOLDER` there, `--examples FOLDER` here.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIDES = Path(__file__).with_name("sft_sides.py")
SHAPES = {
    # hidden, intermediate, layers, heads, key heads, vocabulary, tied
    "tiny": (256, 688, 4, 4, 2, 16_384, True),
    "smol": (576, 1536, 30, 9, 3, 49_152, True),  # as SmolLM2-135M
    "qwen-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "llama-7b": (4096, 11_008, 32, 32, 32, 32_000, False),
    "qwen-7b": (3584, 18_944, 28, 28, 4, 152_064, False),
}
WARM_UP = 1
JOB = (
    *("dtype", "threads", "steps", "lr", "trl_attention", "micro_batch_tokens"),
    *("gradient_checkpointing", "profile"),
)
"""Options that a side gets as they are."""


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="bench_sft_") as name:
        folder = Path(args.work or name)
        examples = Path(args.examples or args.only_examples or folder / "examples")
        if not args.examples:
            prepare(args, examples)
        if args.only_examples:
            return
        facts = facts_of(examples) | save_model(folder / "model", examples, args)
        print(
            f"{facts['episodes']} episodes, {facts['tokens']} tokens, of which"
            f" {facts['trained']} trained ({facts['trained'] / facts['tokens']:.0%}),"
            f" longest {max(facts['lengths'])}; {args.shape}: {facts['parameters'] / 1e6:.0f}M"
            f" parameters, {args.dtype}; {args.threads} threads"
        )
        too_short = [m for m in args.trl_modes if row_length(m) < max(facts["lengths"])]
        if too_short:
            print(f"left out, for they would cut episodes: {', '.join(too_short)}")
            args.trl_modes = [mode for mode in args.trl_modes if mode not in too_short]
        runs = [(args.python, "ours", mode) for mode in args.modes]
        runs += [(args.trl_python, "trl", mode) for mode in args.trl_modes]
        results = {}
        for python, side, mode in runs:
            result = run(args, folder, examples, python, side, mode)
            if result is not None:
                results[side, mode] = result
                print(f"\n{side} {mode} (torch {result['torch']}: {result['note']})")
                print(line_of(args, facts, result), flush=True)
    if {side for side, _ in results} == {"ours", "trl"}:
        compare(results)
    if len(results) < len(runs):
        sys.exit(f"{len(runs) - len(results)} of {len(runs)} runs failed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trl-python", default=sys.executable, help="python that has trl")
    parser.add_argument("--python", default=sys.executable, help="python of our side")
    parser.add_argument("--shape", choices=SHAPES, default="smol")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="full")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["packed"],
        help="packed or padded, and settings of `train`: packed+compile+lora_rank=16",
    )
    parser.add_argument(
        "--trl-modes",
        nargs="*",
        default=["packed:4096", "packed:1024", "padded:1", "padded:4"],
        help="packed:TOKENS of a row, padded:ROWS of a pass; with +liger, +compile or +ATTENTION",
    )
    parser.add_argument("--trl-attention", default="sdpa")
    parser.add_argument("--steps", type=int, default=3, help="the first is warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="say what takes our time")
    parser.add_argument("--limit", type=int, default=3600, help="seconds of a side")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--peak-tflops", type=float, default=989, help="for MFU; H100, dense bf16")
    parser.add_argument("--work", help="keep the model here")
    parser.add_argument("--examples", help="folder of examples that --only-examples wrote")
    parser.add_argument("--only-examples", help="write the examples to this folder, and stop")
    return parser.parse_args()


def prepare(args: argparse.Namespace, examples: Path) -> None:
    """Write the examples, and beside them the tokenizer they are made with."""
    from step_ray.dataset import build_examples, write_examples
    from step_ray.render import Renderer
    from step_ray.training.recipe import DatasetConfig, Recipe
    from step_ray.training.student import train_tokenizer

    with tempfile.TemporaryDirectory(prefix="bench_sft_") as games:
        played = asyncio.run(play(Path(games), args.batch_tokens // 200 + 4, args.size))
    texts = [m.content for t in played for m in t.prompt]
    texts += [x for t in played for s in t.steps for x in (s.text, s.observation or "")]
    tokenizer = train_tokenizer(texts, 4096)
    built, _ = build_examples(
        played, Renderer(tokenizer, args.micro_batch_tokens), Recipe(), DatasetConfig()
    )
    chosen, tokens = [], 0
    for example in built:
        if tokens + len(example.input_ids) <= args.batch_tokens:
            chosen.append(example)
            tokens += len(example.input_ids)
    write_examples(examples, chosen)
    tokenizer.save_pretrained(examples / "tokenizer")


def facts_of(examples: Path) -> dict:
    """What is to be known of the examples."""
    from step_ray.training.batching import load_examples

    loaded = load_examples(examples)
    return {
        "episodes": len(loaded.lengths),
        "tokens": int(loaded.lengths.sum()),
        "lengths": loaded.lengths.tolist(),
        "trained": int(loaded.num_trained.sum()),
    }


async def play(folder: Path, num_games: int, size: str) -> list:
    """Episodes of generated games: the expert's, and the clumsy student's under the oracle."""
    from step_ray.envs import make_env
    from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
    from step_ray.rollout import EpisodeSettings, run_episode
    from step_ray.teacher import ExpertStudent, OracleTeacher
    from step_ray.types import Source, Task

    spec = GeneratorSpec(seed=5, split="train", num_games=num_games, size=size)
    settings = EpisodeSettings(prompt="alfworld_v1", max_steps=60, max_corrections=20)
    episodes = []
    for number, path in enumerate(generate_games(spec, folder)):
        task = Task(
            task_id=f"alfworld/train/{path.parts[-3]}/{path.parts[-2]}",
            env="alfworld",
            split="train",
            goal="",
            params={"game": str(path)},
        )
        env = make_env("alfworld")
        if number % 2:
            student, source, teacher = ExpertStudent(task), Source.EXPERT, None
        else:
            student, source, teacher = (
                clumsy(task),
                Source.SELF_REFLECTED,
                OracleTeacher("alfworld"),
            )
        episodes.append(
            await run_episode(
                task, env, student, settings=settings, source=source, teacher=teacher, seed=number
            )
        )
    return episodes


def clumsy(task):
    """The expert, who does something at random in every third step."""
    from step_ray.envs.alfworld.explorer import Explorer
    from step_ray.teacher import ExpertStudent

    class Clumsy(ExpertStudent):
        def play(self, first, history, draw):
            if random.Random(f"{draw}/slip").random() < 1 / 3:
                return Explorer().play(first, history, draw)
            return super().play(first, history, draw)

    return Clumsy(task)


def llama_config(shape: str, tokenizer: Any, **more: Any) -> Any:
    """A `LlamaConfig` of one of the shapes; `more` wins."""
    from transformers import LlamaConfig

    hidden, wide, layers, heads, key_heads, vocab, tied = SHAPES[shape]
    fields = {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**fields | more)


def save_model(folder: Path, examples: Path, args: argparse.Namespace) -> dict:
    """A Llama with random weights; gives what its FLOPs are counted from."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from step_ray.training.flops import shape_of

    tokenizer = AutoTokenizer.from_pretrained(examples / "tokenizer")
    config = llama_config(args.shape, tokenizer, dtype=args.dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "shape": shape_of(model)}
    del model
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the sides need it
    return facts


def run(
    args: argparse.Namespace, folder: Path, examples: Path, python: str, side: str, mode: str
) -> dict | None:
    """What one side measured; None if it failed, which is printed."""
    job = {
        **{name: getattr(args, name) for name in JOB},
        "cuda": args.device == "cuda",
        "side": side,
        "mode": mode,
        "model": str(folder / "model"),
        "examples": str(examples),
    }
    command = ["timeout", str(args.limit), python, str(SIDES), json.dumps(job)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        print(
            f"\n{side} {mode} failed:\n{done.stderr.decode(errors='replace')[-2000:]}", flush=True
        )
        return None
    if args.profile and side == "ours":
        print("\n" + done.stderr.decode(errors="replace")[-4000:])
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def row_length(trl_mode: str) -> float:
    """Tokens that a row of TRL holds."""
    kind, _, size = trl_mode.partition("+")[0].partition(":")
    return int(size) if kind == "packed" else float("inf")


def seconds(result: dict, clock: str) -> float:
    """The best step after warm-up."""
    return min(step[clock] for step in result["steps"][WARM_UP:])


def line_of(args: argparse.Namespace, facts: dict, result: dict) -> str:
    from step_ray.training.flops import step_flops

    wall, cpu = seconds(result, "wall_s"), seconds(result, "cpu_s")
    flops = step_flops(facts["shape"], facts["lengths"], facts["trained"])
    peak = f"peak {result['peak_mib']:.0f} MiB"
    if args.device == "cuda":
        rest = f"{peak} of GPU memory, MFU {flops / wall / args.peak_tflops / 1e12:.1%}"
    else:
        rest = f"{cpu:.2f} CPU s, {flops / cpu / 1e9:.0f} GFLOP per CPU s, {peak} RSS"
        rest += f" ({result['rss_before_mib']:.0f} before the first step)"
    return (
        f"  {wall:.2f} s a step, {facts['tokens'] / wall:.0f} tokens/s,"
        f" {facts['trained'] / wall:.0f} trained tokens/s, {rest}\n"
        f"  losses {', '.join(f'{x:.6f}' for x in result['losses'])}"
    )


def compare(results: dict) -> None:
    best = {}
    for (side, mode), result in results.items():
        if side not in best or seconds(result, "wall_s") < seconds(best[side][1], "wall_s"):
            best[side] = (mode, result)
    (our_mode, our), (their_mode, their) = best["ours"], best["trl"]
    wall, cpu = (seconds(their, c) / seconds(our, c) for c in ("wall_s", "cpu_s"))
    gap = max(abs(a - b) for a, b in zip(our["losses"], their["losses"], strict=True))
    print(
        f"\nours {our_mode} against trl {their_mode}: {wall:.2f} times the trained tokens/s by"
        f" wall time, {cpu:.2f} by CPU time; {our['peak_mib'] / their['peak_mib']:.2f} times the"
        f" peak memory; losses differ by {gap:.1e} at most"
    )


if __name__ == "__main__":
    main()
