"""Evaluation of the demo's agent: episodes one at a time beside many in flight, on the same tasks.

    python tests/bench/bench_evaluate.py [--tasks 64] [--in-flight 1 64 256] [--set a.b=c ...]

`step-ray evaluate`'s own job against `step-ray serve`'s own application, for each number of
episodes in flight with an empty prefix cache. `whole` is what a user waits for, the start of the
Ray Data job included; `play` is from the first prompt to the last answer, as the replica counts
them. The last part asks for the turns of these episodes once more, at the endpoint and at the same
engine in this process, without Serve, HTTP and environments: what is between them is Serve's
overhead. Both run one after the other on the same cores. `where agent`: the same evaluation with
`evaluate.where: agent`, so that the replica itself plays (`POST /v1/episodes`).
"""

import argparse
import asyncio
import re
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from machine import Stolen, cpu_s, name_of, tree

from step_ray.cluster.raysetup import connected
from step_ray.collection.runner import Address
from step_ray.config import RunConfig, load_config
from step_ray.envs import task_source
from step_ray.evaluate import evaluate
from step_ray.llm import ChatModel, OpenAIChat
from step_ray.react import conversation
from step_ray.render import Renderer
from step_ray.serve import Endpoint, deploy
from step_ray.serving.generation import BatchGenerator
from step_ray.serving.generation_thread import GenerationThread
from step_ray.serving.local_model import LocalModel, LocalStudent
from step_ray.store import read_trajectories
from step_ray.tasks import write_tasks
from step_ray.training.student import load_model, load_tokenizer, resolve_init
from step_ray.types import Message, Trajectory

ROOT = Path(__file__).resolve().parents[2]
GOAL = 8.0
ALONE = 16
"""Episodes for the overhead of turns one after the other."""
KINDS = {"AgentServer": "replica", "ProxyActor": "proxy", "EpisodeRunner": "actor"}
Where = Literal["agent", "actors"]
Turns = list[list[Message]]
"""The prompts of one episode, turn by turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one number of episodes in flight gave."""

    whole_s: float
    play_s: float
    turns: int
    success: int
    cpu: dict[str, float]
    played: list[Trajectory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--where", nargs="+", choices=get_args(Where), default=["agent", "actors"])
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        most = max(args.in_flight)
        config = load_config(
            ROOT / "jobs" / "configs" / "demo.yaml",
            [
                *(f"output_dir={folder}", f"tasks.num_eval={args.tasks}"),
                *(f"serve.max_batch_size={most}", f"collect.episodes_per_actor={most}"),
                *args.set,
            ],
        )
        with connected(config.ray):
            bench(config, args.where, args.in_flight, Path(folder))


def bench(
    config: RunConfig, places: Sequence[Where], in_flight: Sequence[int], folder: Path
) -> None:
    source = task_source(config.env.name)
    source.prepare(config)
    tasks = folder / "tasks.parquet"
    write_tasks(tasks, source.held_out_tasks(config, config.tasks.eval_splits[0]))
    most = max(in_flight)
    for where in places:
        run_side(config, where, most, tasks, folder / f"warm-up-{where}")
        sides = {}
        for number in in_flight:
            stolen = Stolen()
            out = folder / f"{where}-{number}"
            sides[number] = side = run_side(config, where, number, tasks, out)
            print(
                f"where {where}, {number:4} in flight: whole {side.whole_s:7.2f} s, play"
                f" {side.play_s:7.2f} s, {side.turns} turns, {side.turns / side.play_s:6.1f}"
                f" turns/s, {side.success} successes, CPU {shown(side.cpu)}; {stolen}",
                flush=True,
            )
        compare(sides, in_flight)
        if where == "actors":
            overhead(config, sides[most].played, sorted({1, most}))


def compare(sides: Mapping[int, Side], in_flight: Sequence[int]) -> None:
    """How much the first number is beaten by the others."""
    first = sides[in_flight[0]]
    for number in in_flight[1:]:
        side = sides[number]
        cpu = sum(first.cpu.values()) / sum(side.cpu.values())
        print(
            f"{number} against {in_flight[0]} in flight: whole {first.whole_s / side.whole_s:.1f}"
            f" times as fast, play {first.play_s / side.play_s:.1f} times, {cpu:.1f} times less"
            f" CPU; the goal is {GOAL:g}",
            flush=True,
        )


def run_side(config: RunConfig, where: Where, number: int, tasks: Path, out: Path) -> Side:
    """One evaluation with an empty prefix cache: another name is another model to the replica."""
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"concurrency": number})}
    )
    endpoint = serve(config, out.name)
    before, started = cpu_by_kind(), time.monotonic()
    with Watch(endpoint) as watch:
        evaluate(
            config,
            Address(base_url=endpoint.base_url, model=out.name),
            tasks_file=tasks,
            out_dir=out,
            where=where,
        )
    whole = time.monotonic() - started
    played = list(read_trajectories(out))
    return Side(
        whole_s=whole,
        play_s=watch.seconds,
        turns=sum(len(one.steps) for one in played),
        success=sum(one.success for one in played),
        cpu={kind: spent - before.get(kind, 0.0) for kind, spent in cpu_by_kind().items()},
        played=played,
    )


def serve(config: RunConfig, name: str) -> Endpoint:
    return deploy(
        config.student.init,
        name,
        config.served,
        max_length=config.student.max_length,
        dtype=config.student.dtype,
    )


class Watch:
    """Time from the first prompt to the last answer, by the replica's count of tokens."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.base_url.removesuffix("/v1") + "/metrics"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._samples: list[tuple[float, float]] = []

    @property
    def seconds(self) -> float:
        first, last = self._samples[0][1], self._samples[-1][1]
        begin = max(at for at, count in self._samples if count == first)
        return min(at for at, count in self._samples if count == last) - begin

    def __enter__(self) -> "Watch":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._end.wait(0.2):
            self._sample()

    def _sample(self) -> None:
        with urllib.request.urlopen(self._url, timeout=30) as answer:
            text = answer.read().decode()
        counts = re.findall(r"^step_ray_prompt_tokens_total\S* (\S+)$", text, re.MULTILINE)
        self._samples.append((time.monotonic(), sum(map(float, counts))))


def cpu_by_kind() -> dict[str, float]:
    """CPU seconds of this process and of what descends from it."""
    spent: dict[str, float] = {"driver": cpu_s(tree()[0])}
    for pid in tree()[1:]:
        command = name_of(pid)
        kind = next((kind for word, kind in KINDS.items() if word in command), "rest of Ray")
        spent[kind] = spent.get(kind, 0.0) + cpu_s(pid)
    return spent


def shown(cpu: dict[str, float]) -> str:
    parts = ", ".join(f"{kind} {spent:.1f}" for kind, spent in sorted(cpu.items()))
    return f"{sum(cpu.values()):.1f} s ({parts})"


def overhead(config: RunConfig, played: Sequence[Trajectory], in_flight: Sequence[int]) -> None:
    """The same turns at the endpoint and at the engine alone."""
    all_prompts = [turns_of(one) for one in played]
    for number in in_flight:
        # a few episodes are enough where each turn has the engine to itself
        prompts = all_prompts[: max(number, ALONE)]
        num_turns = sum(map(len, prompts))
        endpoint = serve(config, f"overhead-{number}")
        before = cpu_by_kind()
        served_s = asyncio.run(ask_all(client_of(endpoint, number), prompts, number, config))
        cpu = cpu_by_kind()
        served_cpu = sum(cpu.values()) - sum(before.values())
        before_s = cpu_s(tree()[0])
        alone_s = asyncio.run(ask_engine(prompts, number, config))
        alone_cpu = cpu_s(tree()[0]) - before_s
        print(
            f"{num_turns} turns, {number} at once: served {1000 * served_s / num_turns:.2f} ms a"
            f" turn ({1000 * served_cpu / num_turns:.2f} ms CPU), engine alone"
            f" {1000 * alone_s / num_turns:.2f} ms ({1000 * alone_cpu / num_turns:.2f} ms CPU);"
            f" Serve, HTTP and client {1000 * (served_s - alone_s) / num_turns:.2f} ms",
            flush=True,
        )


def turns_of(played: Trajectory) -> Turns:
    """What the agent was shown before each of its steps."""
    return [conversation(played.prompt, played.steps[:index]) for index in range(len(played.steps))]


def client_of(endpoint: Endpoint, number: int) -> OpenAIChat:
    return OpenAIChat(base_url=endpoint.base_url, model=endpoint.model, max_concurrency=number)


async def ask_all(
    student: ChatModel, prompts: list[Turns], number: int, config: RunConfig
) -> float:
    """Seconds for all turns, those of an episode one after the other, `number` episodes at once."""
    slots = asyncio.Semaphore(number)

    async def episode(index: int, turns: Turns) -> None:
        async with slots:
            for messages in turns:
                await student.complete(
                    messages,
                    max_tokens=config.collect.max_new_tokens,
                    session_id=f"episode-{index}",
                )

    started = time.monotonic()
    await asyncio.gather(*(episode(*pair) for pair in enumerate(prompts)))
    seconds = time.monotonic() - started
    await student.aclose()
    return seconds


async def ask_engine(prompts: list[Turns], number: int, config: RunConfig) -> float:
    """The engine of a replica, in this process."""
    source, max_length = resolve_init(config.student.init), config.student.max_length
    tokenizer = load_tokenizer(source)
    thread = GenerationThread(
        BatchGenerator(
            load_model(source, config.student.dtype),
            tokenizer,
            max_length=max_length,
            prefix_cache_mb=512,
        ),
        max_batch_size=config.serve.max_batch_size,
        batch_wait_s=config.serve.batch_wait_s,
        num_threads=config.serve.num_threads,
    )
    model = LocalModel(
        name="alone",
        renderer=Renderer(tokenizer, max_length),
        thread=thread,
        max_length=max_length,
        timeout_s=config.serve.request_timeout_s,
        on_answer=lambda answer: None,
    )
    try:
        return await ask_all(LocalStudent(model), prompts, number, config)
    finally:
        model.close()


if __name__ == "__main__":
    main()
