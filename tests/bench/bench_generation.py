"""Turns per second of `BatchGenerator` next to Hugging Face `generate()`, on a tiny Llama.

Every session is a conversation whose prompt grows turn by turn, as in an episode. Run:
`python tests/bench/bench_generation.py [--threads 1] [--sessions 32] [--turns 8]`; on a GPU with
`--device cuda --model FOLDER` for the weights of any model folder, in bfloat16.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from step_ray.config import ScratchConfig
from step_ray.serving.generation import BatchGenerator, SamplingParams
from step_ray.training.student import load_model, load_tokenizer, new_model, train_tokenizer

FIRST_PROMPT, OBSERVATION, ANSWER, MAX_LENGTH = 600, 30, 20, 2048
Ids = list[int]
Engine = Callable[[list[Ids]], list[Ids]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="folder; without one a tiny model in float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = _model(args.model)
    model.to(args.device).eval()
    cache_mb = 32_768 if args.model else 1024
    engines = {
        "hf generate": lambda: _hf(model),
        "ours, no reuse": lambda: _ours(model, tokenizer, 0),
        "ours, reuse": lambda: _ours(model, tokenizer, cache_mb),
    }
    if args.device != "cpu":
        engines["ours, reuse, nothing recorded"] = lambda: _ours(
            model, tokenizer, cache_mb, record_steps=False
        )
    answers = {}
    for name, make in engines.items():
        seconds, answers[name] = _play(make(), args.sessions, args.turns)
        turns = args.sessions * args.turns
        print(f"{name:30} {turns / seconds:7.1f} turns/s {turns * ANSWER / seconds:8.0f} tokens/s")
    print("same tokens:", len({str(a) for a in answers.values()}) == 1)


def _model(folder: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model whose answers have the full length: it knows no end."""
    if folder:
        model, tokenizer = load_model(folder, "bfloat16"), load_tokenizer(folder)
    else:
        tokenizer = train_tokenizer(["Thought: I go. Action: go to desk 1\n"], 512)
        model = new_model(tokenizer, ScratchConfig(), max_length=MAX_LENGTH, seed=0)
        model.lm_head = torch.nn.Linear(128, len(tokenizer), bias=False)  # tied: repeats one token
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    return model, tokenizer


def _play(engine: Engine, num_sessions: int, num_turns: int) -> tuple[float, list[Ids]]:
    random = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(7, 260, (size,), generator=random).tolist()  # noqa: E731
    prompts = [draw(FIRST_PROMPT + 10 * (i % 8)) for i in range(num_sessions)]
    engine([draw(8)])  # warm up
    seconds = 0.0
    for _ in range(num_turns):
        start = time.perf_counter()
        answers = engine(prompts)
        seconds += time.perf_counter() - start
        prompts = [p + a + draw(OBSERVATION) for p, a in zip(prompts, answers, strict=True)]
    return seconds, prompts


def _ours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_mb: int,
    record_steps: bool | None = None,
) -> Engine:
    engine = BatchGenerator(
        model,
        tokenizer,
        max_length=MAX_LENGTH,
        prefix_cache_mb=cache_mb,
        record_steps=record_steps,
    )
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    return lambda prompts: [list(g.ids) for g in engine.generate(prompts, [params] * len(prompts))]


def _hf(model: PreTrainedModel) -> Engine:
    def run(prompts: list[Ids]) -> list[Ids]:
        width = max(len(p) for p in prompts)
        rows = [[0] * (width - len(p)) + p for p in prompts]
        seen = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (torch.tensor(x, device=model.device) for x in (rows, seen))
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER, do_sample=False
            )
        return out[:, width:].tolist()

    return run


if __name__ == "__main__":
    main()
