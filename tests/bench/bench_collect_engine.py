"""Collection against a real engine (vLLM): its tokens/s beside the engine's own offline rate.

    python tests/bench/bench_collect_engine.py --vllm-python VENV/bin/python
    python tests/bench/bench_collect_engine.py --vllm-python VENV/bin/python --shape smol
    python tests/bench/bench_collect_engine.py --base-url http://host:8000/v1 --served NAME
                                               [--model FOLDER --vllm-python VENV/bin/python]

The first two start the engine, the third uses one that runs. `--shape` puts random weights of a
larger shape in place of the tiny model, which costs an engine next to nothing per token.
The collection plays generated ALFWorld games with `--concurrency` episodes in flight; its rate is
that of the engine's own counters (/metrics), from the first prompt to the last token, so the start
of Ray is left out. Then the engine is stopped and `LLM.generate` gets the same prompts (rebuilt
from the trajectories, their lengths checked against what the engine counted), in the order of
turns, each to write as many tokens as in the collection. On a GPU: give the model's folder, and
`--engine-args ""` or your own. An engine that somebody else runs is left alone: stop it before the
offline part if both do not fit on the device (`--offline no` leaves that part out).
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from bench_collect import make_tasks, many
from bench_sft import SHAPES, llama_config
from machine import Stolen, cpu_of_tree, cpu_s, tree
from transformers import AutoTokenizer, LlamaForCausalLM

from step_ray.cluster.raysetup import connected
from step_ray.collect import run_episodes
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.config import RayConfig
from step_ray.react import conversation
from step_ray.rollout import EpisodeSettings
from step_ray.store import iter_trajectories
from step_ray.training.student import load_tokenizer, resolve_init, save_student
from step_ray.types import Author, Source

TINY = "builtin:tiny-base"
CPU_ARGS = "--enforce-eager --dtype bfloat16 --max-model-len 2048"
GOAL = 0.9
OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

if __name__ == "__main__":
    work, model, options = json.load(open(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
    engine = LLM(model=model, enable_prefix_caching=True, **options)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in work]
    limits = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for _, n in work]
    engine.generate([TokensPrompt(prompt_token_ids=[5, 6, 7])], limits[0], use_tqdm=False)
    started = time.perf_counter()
    answers = engine.generate(prompts, limits, use_tqdm=False)
    seconds = time.perf_counter() - started
    print("RESULT", json.dumps([sum(len(a.outputs[0].token_ids) for a in answers), seconds]))
"""


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


class Counters:
    """The engine's counters, read several times a second while a block runs."""

    NAMES = ("generation_tokens", "prompt_tokens", "prefix_cache_queries", "prefix_cache_hits")

    def __init__(self, base_url: str) -> None:
        self._url = base_url.removesuffix("/v1") + "/metrics"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[tuple[float, dict[str, float]]] = []

    def read(self) -> dict[str, float]:
        text = get(self._url)
        return {
            name: sum(
                float(value)
                for value in re.findall(rf"^vllm:{name}_total\S* (\S+)$", text, re.MULTILINE)
            )
            for name in self.NAMES
        }

    def __enter__(self) -> "Counters":
        self.samples.append((time.perf_counter(), self.read()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.samples.append((time.perf_counter(), self.read()))

    def _run(self) -> None:
        while not self._end.wait(0.25):
            self.samples.append((time.perf_counter(), self.read()))

    def total(self, name: str) -> float:
        return self.samples[-1][1][name] - self.samples[0][1][name]

    def seconds(self) -> float:
        """From the last sample without a new prompt to the first one with all tokens."""
        first, last = self.samples[0][1], self.samples[-1][1]
        start = max(t for t, c in self.samples if c["prompt_tokens"] == first["prompt_tokens"])
        key = "generation_tokens"
        return min(t for t, c in self.samples if c[key] == last[key]) - start


def environment(python: str) -> dict[str, str]:
    """The engine's own environment first on the path; what a CPU build needs, unless it is set."""
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**cpu, **quiet, **inherited, "PATH": path}


@contextmanager
def engine(args: argparse.Namespace, log: Path) -> Iterator[tuple[str, str, int | None]]:
    """Base URL, model name and process of the engine; started here unless a URL was given."""
    if args.base_url:
        yield args.base_url, args.served, None
        return
    command = [str(Path(args.vllm_python).parent / "vllm"), "serve", args.model]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(args.port)]
    command += ["--enable-prefix-caching", *shlex.split(args.engine_args)]
    base_url, started = f"http://127.0.0.1:{args.port}/v1", time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env=environment(args.vllm_python),
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            while not _answers(base_url):
                if process.poll() is not None or time.perf_counter() - started > args.start_s:
                    tail = log.read_text()[-2000:]
                    sys.exit(f"cannot run: the engine did not start in {args.start_s} s:\n{tail}")
                time.sleep(1)
            print(f"engine ready after {time.perf_counter() - started:.0f} s", flush=True)
            yield base_url, "m", process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its session is our own; it dies slowly else
            process.wait()


def _answers(base_url: str) -> bool:
    try:
        return bool(get(base_url + "/models"))
    except OSError:
        return False


def collect(
    args: argparse.Namespace, base_url: str, model: str, pid: int | None, work: Path
) -> float:
    """Play; print what the engine counted; gives generated tokens per second."""
    actors = -(-args.concurrency // args.per_actor)
    plan = EpisodePlan(
        source=Source.STUDENT,
        settings=EpisodeSettings(
            prompt="alfworld_short",
            max_steps=args.turns,
            max_new_tokens=args.max_tokens,
            max_format_errors=10**9,  # what a random model writes cannot be read
        ),
        env="alfworld",
        student=Address(base_url=base_url, model=model, api_key_env=args.api_key_env),
        num_actors=actors,
        min_actors=actors,
        episodes_per_actor=-(-args.concurrency // actors),
    )
    tasks = many(make_tasks(work / "games", "small"), args.episodes)
    stolen = Stolen()
    with connected(RayConfig(num_cpus=8, object_store_mb=200)), Counters(base_url) as counters:
        ours, engine = cpu_of_tree(), _engine_cpu(pid)
        summary = run_episodes(tasks, plan, work / "out")
        ours = {k: v - ours[k] for k, v in cpu_of_tree().items()}
        engine = _engine_cpu(pid) - engine
        ours["ray"] -= engine  # a child of this process, too
    seconds, tokens = counters.seconds(), counters.total("generation_tokens")
    queries = counters.total("prefix_cache_queries")
    hits = counters.total("prefix_cache_hits") / queries if queries else float("nan")
    turns = summary.num_steps
    print(
        f"collection: {summary.num_episodes} episodes, {turns} turns, {args.concurrency} in flight,"
        f" {tokens:,.0f} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s,"
        f" {turns / seconds:.1f} turns/s; prefix-cache hits {100 * hits:.1f} % of prompt tokens\n"
        f"  CPU ms per turn: engine {1e3 * engine / turns:.1f},"
        f" {', '.join(f'{k} {1e3 * v / turns:.1f}' for k, v in ours.items())}; {stolen}",
        flush=True,
    )
    return tokens / seconds


def _engine_cpu(pid: int | None) -> float:
    return sum(map(cpu_s, tree(pid))) if pid else 0.0


def prompts(args: argparse.Namespace, work: Path) -> list[tuple[list[int], int]]:
    """Every prompt that was sent, with the tokens that came back, in the order of turns."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found: list[tuple[int, list[int], int]] = []
    wrong = 0
    for trajectory in iter_trajectories(work / "out"):
        for number, step in enumerate(trajectory.steps):
            if step.author is not Author.STUDENT or not step.completion_tokens:
                continue
            messages = [
                {"role": m.role, "content": m.content}
                for m in conversation(trajectory.prompt, trajectory.steps[:number])
            ]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            wrong += len(ids) != step.prompt_tokens
            found.append((number, list(ids), step.completion_tokens))
    print(f"{len(found)} prompts rebuilt, {wrong} of another length than the engine counted")
    found.sort(key=lambda item: item[0])
    return [(ids, count) for _, ids, count in found]


def offline(args: argparse.Namespace, work: Path) -> float:
    """Tokens per second of `LLM.generate` on the collection's prompts."""
    (work / "prompts.json").write_text(json.dumps(prompts(args, work)))
    (work / "offline.py").write_text(OFFLINE)
    words = shlex.split(args.engine_args)
    options = {
        word.removeprefix("--").replace("-", "_"): _value(words, place)
        for place, word in enumerate(words)
        if word.startswith("--")
    }
    stolen = Stolen()
    run = subprocess.run(
        [args.vllm_python, "offline.py", "prompts.json", args.model, json.dumps(options)],
        cwd=work,
        env=environment(args.vllm_python),
        capture_output=True,
        text=True,
        check=False,
    )
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        sys.exit(f"cannot run: the offline engine failed:\n{run.stderr[-2000:]}")
    tokens, seconds = json.loads(results[0].removeprefix("RESULT "))
    print(
        f"offline: {tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s; {stolen}"
    )
    return tokens / seconds


def _value(words: list[str], place: int) -> object:
    """The value of an option of the command line; an option without one is a switch."""
    value = words[place + 1] if place + 1 < len(words) else "--"
    if value.startswith("--"):
        return True
    return int(value) if value.isdigit() else value


def random_model(shape: str, folder: Path) -> str:
    """A Llama of this shape with random weights and the tiny model's tokenizer and template."""
    tokenizer = load_tokenizer(resolve_init(TINY))
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(shape, tokenizer, vocab_size=len(tokenizer)))
    save_student(folder, model, tokenizer)
    print(f"model: {model.num_parameters():,} random parameters in the shape {shape}", flush=True)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", default="", help="python of an environment with vllm")
    parser.add_argument("--model", default=resolve_init(TINY))
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of --model")
    parser.add_argument("--base-url", default="", help="an engine that runs already, with /v1")
    parser.add_argument("--served", default="m", help="its name of the model")
    parser.add_argument("--api-key-env", default="", help="variable that holds its key")
    parser.add_argument("--engine-args", default=CPU_ARGS)
    parser.add_argument("--offline", choices=("yes", "no"), default="yes")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--per-actor", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=192)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--start-s", type=float, default=600.0)
    args = parser.parse_args()
    if not (args.base_url or args.vllm_python):
        sys.exit("cannot run: no engine; give --base-url, or --vllm-python of an environment")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.shape:
            args.model = random_model(args.shape, work / "model")
        with engine(args, work / "engine.log") as (base_url, model, pid):
            rate = collect(args, base_url, model, pid, work)
        if args.offline == "no" or not args.vllm_python:
            print("offline part left out: it needs --vllm-python, --model and the device")
            return
        own = offline(args, work)
        verdict = "reached" if rate >= GOAL * own else "missed"
        print(f"collection / offline = {100 * rate / own:.1f} % (goal 90 %: {verdict})")


if __name__ == "__main__":
    main()
