"""What collections of 10^5 and 10^6 episodes cost, from a run of 10^4 and from copies of it.

    python tests/bench/bench_collect_scale.py [--episodes 10000] [--copies 90000]

1. The real Ray Data job plays `--episodes` on generated ALFWorld games with a student that answers
   from a script (no HTTP): episodes/s, blocks, object store, files, memory of the driver as it
   grows.
2. The folder is read again: outcomes (a restart, a summary), whole trajectories (a data set).
3. `--copies` more episodes, copies of those with ids of their own, go through the same shard writer
   and are read again: files and memory at that size are measured, not extrapolated.
4. From what grew in 1 and 3: the same at 10^5 and 10^6.
"""

import argparse
import gc
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from bench_collect import make_tasks, many
from machine import Stolen, cpu_of_tree, memory_mb

from step_ray.cluster.raysetup import connected
from step_ray.collect import run_episodes
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.config import RayConfig
from step_ray.llm import Completion
from step_ray.rollout import EpisodeSettings
from step_ray.storage.shards import shard_paths
from step_ray.storage.shardwriter import ShardWriter
from step_ray.store import finished_ids, iter_outcomes, iter_trajectories
from step_ray.types import Source, Task, Trajectory

ACTIONS = ("look", "inventory", "go to desk 1", "examine desk 1", "go to bed 1")
ROWS_PER_SHARD = 16


class Scripted:
    """A student that costs nothing."""

    name, refusal = "scripted", ""

    async def complete(self, messages: list, **_: object) -> Completion:
        action = ACTIONS[len(messages) // 2 % len(ACTIONS)]
        text = f"Thought: I have not found it yet, so I go on with this.\nAction: {action}"
        return Completion(text=text, prompt_tokens=100 * len(messages), completion_tokens=20)

    async def aclose(self) -> None:
        """Nothing to close."""


class ScriptedAddress(Address):
    """Where `Scripted` answers."""

    def connect(self, **_: object) -> Scripted:
        return Scripted()


class Watch:
    """Samples the driver and its folder while a block runs."""

    def __init__(self, folder: Path, is_ray: bool = True) -> None:
        self._folder, self._is_ray = folder, is_ray
        self.done = self.most_files = 0
        self.store_mb = 0.0
        self.samples: list[tuple[int, float]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        gc.collect()
        self.before, self._stolen = memory_mb(), Stolen()
        self._cpu, self._started = cpu_of_tree(), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._started
        after = cpu_of_tree()
        self.cpu = {kind: after[kind] - self._cpu[kind] for kind in after}
        self.machine = str(self._stolen)
        self.peak = max((mb for _, mb in self.samples), default=self.before["own"])

    def _run(self) -> None:
        while not self._end.wait(1.0):
            self.samples.append((self.done, memory_mb()["own"]))
            self.most_files = max(self.most_files, len(list(self._folder.glob("*.parquet"))))
            if self._is_ray:
                total, free = (
                    resources.get("object_store_memory", 0.0)
                    for resources in (ray.cluster_resources(), ray.available_resources())
                )
                self.store_mb = max(self.store_mb, (total - free) / 2**20)

    def growth_kb(self) -> float:
        """KiB of the driver per episode: the slope over the second half of the episodes."""
        late = [(done, mb) for done, mb in self.samples if done > self.done / 2]
        if len(late) < 3:
            return float("nan")
        done, mb = zip(*late, strict=True)
        return 1024 * float(np.polyfit(done, mb, 1)[0])


def disk(folder: Path) -> tuple[int, float]:
    """Files that count, and MiB of them."""
    paths = shard_paths(folder)
    return len(paths), sum(path.stat().st_size for path in paths) / 2**20


def play(tasks: list[Task], args: argparse.Namespace, out: Path) -> Watch:
    """Part 1."""
    plan = EpisodePlan(
        source=Source.STUDENT,
        settings=EpisodeSettings(prompt="alfworld_v1", max_steps=args.turns),
        env="alfworld",
        student=ScriptedAddress(base_url="none", model="m"),
        num_actors=args.actors,
        min_actors=args.actors,
        episodes_per_actor=args.per_actor,
        rows_per_shard=ROWS_PER_SHARD,
    )
    with connected(RayConfig(num_cpus=4, object_store_mb=args.object_store_mb)):
        with Watch(out) as watch:

            def count(_: object) -> None:
                watch.done += 1

            summary = run_episodes(tasks, plan, out, on_episode=count)
        assert summary.num_episodes == len(tasks) and not summary.num_errors
    return watch


def read(name: str, folder: Path, open_: Callable[[Path], Iterator[object]]) -> None:
    """Part 2: go through a folder once."""
    with Watch(folder, is_ray=False) as watch:
        for _ in open_(folder):
            watch.done += 1
    extra = max(0.0, watch.peak - watch.before["own"])
    print(
        f"  {name:12} {watch.done:9,} in {watch.seconds:6.1f} s"
        f" ({1e6 * watch.cpu['driver'] / watch.done:6.0f} us of CPU each), {extra:5.0f} MiB more"
    )


def copies(folder: Path, number: int, first: int) -> Iterator[Trajectory]:
    """So many trajectories with ids of their own."""
    few = list(itertools.islice(iter_trajectories(folder), 500))
    for n in range(number):
        model, name = few[n % len(few)], f"alfworld/train/{first + n:07}"
        task = replace(model.task, task_id=name)
        yield replace(model, task=task, trajectory_id=f"{name}#{model.source.value}#0")


def grow(folder: Path, number: int, first: int) -> Watch:
    """Part 3."""
    with Watch(folder, is_ray=False) as watch, ShardWriter(folder, ROWS_PER_SHARD) as writer:
        for trajectory in copies(folder, number, first):
            writer.add(trajectory)
            watch.done += 1
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--copies", type=int, default=90_000)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--per-actor", type=int, default=32)
    parser.add_argument("--object-store-mb", type=int, default=200)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        _run(args, work)
    finally:
        shutil.rmtree(work)


def _run(args: argparse.Namespace, work: Path) -> None:
    games, out = make_tasks(work / "games", "small"), work / "out"
    before = memory_mb()["own"]
    tasks = many(games, args.episodes)
    task_kb = 1024 * (memory_mb()["own"] - before) / args.episodes
    watch = play(tasks, args, out)
    num_files, mb = disk(out)
    cpu = {kind: 1e3 * seconds / args.episodes for kind, seconds in watch.cpu.items()}
    per_row = 1024 * mb / args.episodes
    memory = memory_mb()
    print(
        f"{args.episodes:,} episodes of {args.turns} turns: {watch.seconds:.0f} s,"
        f" {args.episodes / watch.seconds:.1f} episodes/s; {watch.machine}\n"
        f"  CPU ms per episode: {', '.join(f'{kind} {ms:.1f}' for kind, ms in cpu.items())}\n"
        f"  blocks {args.episodes:,} (one per episode), object store at most"
        f" {watch.store_mb:.1f} MiB\n"
        f"  driver: {watch.before['own']:.0f} MiB of its own at the start, {watch.peak:.0f} at"
        f" most, {watch.growth_kb():+.2f} KiB per episode over the second half; at the end"
        f" RSS {memory['rss']:.0f}, PSS {memory['pss']:.0f}; its task list {task_kb:.2f} KiB"
        f" per task\n"
        f"  files: {-(-args.episodes // ROWS_PER_SHARD):,} shards written, at most"
        f" {watch.most_files} at a time, {num_files} at the end; {mb:.1f} MiB,"
        f" {per_row:.2f} KiB per episode"
    )
    read("ids", out, lambda folder: iter(finished_ids(folder).to_pylist()))
    read("outcomes", out, iter_outcomes)
    read("trajectories", out, iter_trajectories)
    if args.copies:
        _grown(args, out)
    print(f"{'':24}{'blocks':>10}{'shards':>9}{'files':>7}{'disk GiB':>9}{'driver MiB':>11}")
    for number in (10**5, 10**6):
        growth = max(0.0, watch.growth_kb())
        driver = watch.peak + (number - args.episodes) * (growth + task_kb) / 1024
        files = -(-number // (64 * 64 * ROWS_PER_SHARD))
        print(
            f"  {number:9,} episodes    {number:>10,}{-(-number // ROWS_PER_SHARD):>9,}"
            f"{f'<{files + 2 * 63}':>7}{number * per_row / 2**20:>9.2f}{driver:>11.0f}"
        )


def _grown(args: argparse.Namespace, out: Path) -> None:
    """What part 3 shows."""
    watch = grow(out, args.copies, args.episodes)
    num_files, mb = disk(out)
    print(
        f"{args.copies:,} copies written in {watch.seconds:.0f} s, merges included; at most"
        f" {watch.most_files} files at a time, {num_files} at the end, {mb:.0f} MiB; driver"
        f" {watch.growth_kb():+.2f} KiB per episode, peak {watch.peak - watch.before['own']:+.0f}"
        f" MiB; {watch.machine}"
    )
    read("ids", out, lambda folder: iter(finished_ids(folder).to_pylist()))
    read("outcomes", out, iter_outcomes)
    read("trajectories", out, iter_trajectories)


if __name__ == "__main__":
    main()
