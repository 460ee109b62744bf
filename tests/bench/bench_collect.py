"""Collection against an endpoint of fixed latency: how much of the ideal rate is reached.

    python tests/bench/bench_collect.py [--concurrency 1 16 64 256] [--latency 1] [--turns 10]

Ideal: every one of C episodes in flight always has a call under way, so C / latency calls a second
come and C / (latency * turns) episodes a second end. The rate is that of the calls that reach the
endpoint (a process of its own), from the first to the last, start of Ray left out; `middle` is the
same for the middle 80 % of the calls. CPU per turn is all of the job's processes: driver, actors
and the rest of Ray, without the endpoint. `without Ray` is the event loop of one actor in this
process. The sequential loop plays as ETO's released code does: one episode at a time, one call at a
time, in one process without Ray.
"""

import argparse
import asyncio
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from machine import Stolen, cpu_of_tree

from step_ray.cluster.raysetup import connected
from step_ray.collect import run_episodes
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.config import RayConfig
from step_ray.envs import make_env
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.rollout import EpisodeSettings, run_episode
from step_ray.types import Source, Task

HERE = Path(__file__).resolve().parent
GOAL_SHARE, GOAL_CPU_MS = 0.85, 5.0


@dataclass
class Endpoint:
    """A running endpoint.py."""

    port: int

    def stats(self) -> dict:
        """What it counted since the last question."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/stats")
        record = json.loads(connection.getresponse().read())
        connection.close()
        return record

    @property
    def address(self) -> Address:
        return Address(base_url=f"http://127.0.0.1:{self.port}/v1", model="m")


@contextmanager
def endpoint(latency: float) -> Iterator[Endpoint]:
    command = [sys.executable, str(HERE / "endpoint.py"), "--latency", str(latency)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        yield Endpoint(int(process.stdout.readline()))
        process.stdin.close()


def make_tasks(folder: Path, size: str) -> list[Task]:
    """48 generated games."""
    spec = GeneratorSpec(seed=0, split="train", num_games=48, size=size)
    games = [str(path) for path in generate_games(spec, folder)]
    return [
        Task(task_id=f"t/{n}", env="alfworld", split="train", goal="", params={"game": game})
        for n, game in enumerate(games)
    ]


def many(tasks: list[Task], number: int) -> list[Task]:
    """So many tasks on those games, each with an id of its own."""
    return [
        Task(
            task_id=f"alfworld/train/{n:07}",
            env="alfworld",
            split="train",
            goal="",
            params=tasks[n % len(tasks)].params,
        )
        for n in range(number)
    ]


def settings(args: argparse.Namespace) -> EpisodeSettings:
    return EpisodeSettings(prompt="alfworld_v1", max_steps=args.turns)


def rates(arrivals: list[float], latency: float) -> tuple[float, float]:
    """Calls per second over all calls, and over the middle 80 % of them."""
    arrivals = sorted(arrivals)
    whole = len(arrivals) / (arrivals[-1] - arrivals[0] + latency)
    low, high = len(arrivals) // 10, len(arrivals) * 9 // 10
    span = arrivals[high] - arrivals[low]
    return whole, (high - low) / span if span else whole


def sequential(tasks: list[Task], address: Address, args: argparse.Namespace) -> float:
    """Episodes per minute of the plain loop, and its CPU."""

    async def play() -> int:
        student, done = address.connect(), 0
        for task in tasks[: args.sequential]:
            env = make_env("alfworld")
            await run_episode(
                task, env, student, settings=settings(args), source=Source.STUDENT, seed=0
            )
            env.close()
            done += 1
        await student.aclose()
        return done

    started, cpu = time.perf_counter(), time.process_time()
    done = asyncio.run(play())
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    turns = done * args.turns
    print(
        f"{'sequential loop':>16} {60 * done / seconds:9.1f}"
        f" {100 * turns * args.latency / seconds:7.1f} %"
        f" {'':8} {1e3 * cpu / turns:7.2f}"
    )
    return 60 * done / seconds


def without_ray(
    concurrency: int, tasks: list[Task], service: Endpoint, args: argparse.Namespace
) -> None:
    """The same episodes on one event loop of this process: what an actor itself costs."""

    async def play() -> None:
        student, number = service.address.connect(max_concurrency=concurrency), args.waves
        with ThreadPoolExecutor(1) as executor:

            async def place(mine: list[Task]) -> None:
                for task in mine:
                    env = make_env("alfworld")
                    await run_episode(
                        task,
                        env,
                        student,
                        settings=settings(args),
                        source=Source.STUDENT,
                        executor=executor,
                    )
                    env.close()

            todo = many(tasks, concurrency * number)
            await asyncio.gather(*(place(todo[n::concurrency]) for n in range(concurrency)))
        await student.aclose()

    stolen, cpu = Stolen(), time.process_time()
    service.stats()
    asyncio.run(play())
    cpu = time.process_time() - cpu
    stats = service.stats()
    whole, middle = rates(stats["arrivals"], args.latency)
    ideal = concurrency / args.latency
    print(
        f"{concurrency:4} without Ray {60 * whole / args.turns:9.1f} {100 * whole / ideal:7.1f} %"
        f" {100 * middle / ideal:6.1f} % {1e3 * cpu / len(stats['arrivals']):7.2f} ; {stolen}",
        flush=True,
    )


def measure(
    concurrency: int, tasks: list[Task], service: Endpoint, args: argparse.Namespace, work: Path
) -> tuple[float, float, float]:
    """Play, print a line; gives episodes/min, share of the ideal and CPU per turn in ms."""
    actors = -(-concurrency // args.per_actor)
    plan = EpisodePlan(
        source=Source.STUDENT,
        settings=settings(args),
        env="alfworld",
        student=service.address,
        num_actors=actors,
        min_actors=actors,
        episodes_per_actor=-(-concurrency // actors),
        cpus_per_actor=0.5,
    )
    number = concurrency * max(args.waves, 3 if concurrency == 1 else 1)
    marks: list[tuple[float, dict[str, float]]] = []
    first = last = None

    def on_episode(_: object) -> None:
        nonlocal first, last
        marks.append((time.perf_counter(), {}))
        if len(marks) == concurrency or first is None:
            first = (len(marks), cpu_of_tree())
        if len(marks) == number:
            last = (len(marks), cpu_of_tree())

    stolen = Stolen()
    service.stats()
    run_episodes(many(tasks, number), plan, work / str(concurrency), on_episode=on_episode)
    stats = service.stats()
    whole, middle = rates(stats["arrivals"], args.latency)
    ideal = concurrency / args.latency
    turns = (last[0] - first[0]) * args.turns
    spent = {k: 1e3 * (last[1][k] - first[1][k]) / turns for k in last[1]}
    cpu = sum(spent.values())
    print(
        f"{concurrency:4} in {actors:2} actors {60 * whole / args.turns:9.1f}"
        f" {100 * whole / ideal:7.1f} % {100 * middle / ideal:6.1f} % {cpu:7.2f}"
        f"  ({', '.join(f'{k} {v:.2f}' for k, v in spent.items())});"
        f" {len(stats['arrivals'])} calls, {stats['most']} at once at most; {stolen}",
        flush=True,
    )
    return 60 * whole / args.turns, whole / ideal, cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--without-ray", type=int, nargs="*", default=[64])
    parser.add_argument("--per-actor", type=int, default=128, help="most episodes in one actor")
    parser.add_argument("--latency", type=float, default=1.0, help="of a call, seconds")
    parser.add_argument("--turns", type=int, default=10, help="per episode")
    parser.add_argument("--waves", type=int, default=3, help="episodes per place in flight")
    parser.add_argument("--sequential", type=int, default=2, help="episodes of the plain loop")
    parser.add_argument("--size", default="small", help="of the games: tiny, small, full")
    args = parser.parse_args()
    print(f"{'in flight':>16} {'episodes/min':>9} {'of ideal':>9} {'middle':>8} {'CPU ms/turn':>7}")
    with tempfile.TemporaryDirectory() as folder, endpoint(args.latency) as service:
        work = Path(folder)
        tasks = make_tasks(work / "games", args.size)
        alone = sequential(tasks, service.address, args)
        for concurrency in args.without_ray:
            without_ray(concurrency, tasks, service, args)
        if not args.concurrency:
            return
        with connected(RayConfig(num_cpus=8, object_store_mb=200)):
            for concurrency in args.concurrency:
                rate, share, cpu = measure(concurrency, tasks, service, args, work)
                if concurrency == 64:
                    good = share >= GOAL_SHARE and cpu < GOAL_CPU_MS
                    print(
                        f"goal at 64 (85 % of ideal, 5 ms): {'reached' if good else 'missed'};"
                        f" {rate / alone:.1f} times the sequential loop"
                    )


if __name__ == "__main__":
    main()
