"""ScienceWorld: lean step against the stock one, many worlds in one Java machine, memory, start-up.

    python tests/bench/bench_scienceworld.py --seconds 20

Both sides of every ratio come from this one run, in turns, on the same actions. CPU is that of the
Java machine and of this process together; wall time is of a machine that may be busy.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from scienceworld import ScienceWorldEnv

from step_ray.envs.scienceworld.env import ScienceworldEnv
from step_ray.envs.scienceworld.jvm import java_path, shared_pool
from step_ray.envs.scienceworld.tasks import make_task

TASK, VARIATION = "boil", 21
ACTIONS = (
    *("go to kitchen", "look around", "pick up thermometer", "open cupboard", "pick up metal pot"),
    *("open freezer", "open fridge", "open oven", "look in fridge", "go to hallway"),
    *("go to workshop", "look around", "pick up lead", "inventory", "go to hallway"),
    *("go to kitchen", "move lead to metal pot", "move metal pot to stove", "examine metal pot"),
)
NUM_WORLDS = (1, 4, 16)
HEAP_MB = 512
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) / 1024


class Meter:
    """Steps, CPU and wall time of one side."""

    def __init__(self, name: str, java: int) -> None:
        self.name, self.java = name, java
        self.steps, self.cpu, self.wall = 0, 0.0, 0.0

    @contextmanager
    def on(self, steps: int) -> Iterator[None]:
        """Measure the block."""
        cpu, wall = cpu_s(self.java) + time.process_time(), time.perf_counter()
        yield
        self.steps += steps
        self.cpu += cpu_s(self.java) + time.process_time() - cpu
        self.wall += time.perf_counter() - wall

    def __str__(self) -> str:
        return (
            f"{self.name:22} {self.steps:6} steps, {1000 * self.cpu / self.steps:7.2f} CPU-ms and"
            f" {1000 * self.wall / self.steps:7.2f} ms a step,"
            f" {self.steps / self.wall:7.1f} steps/s"
        )


def start_up() -> tuple[float, float]:
    """Seconds to the first observation, and of a load into a world that is there."""
    env = ScienceworldEnv(heap_mb=HEAP_MB)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        env.reset(make_task(TASK, VARIATION, "test"))
        times.append(time.perf_counter() - started)
        env.close()
    return times[0], times[1]


def stock_env() -> ScienceWorldEnv:
    """The stock environment, on the same Java with the same heap."""
    os.environ["PATH"] = f"{Path(java_path()).parent}:{os.environ['PATH']}"
    os.environ["JAVA_TOOL_OPTIONS"] = f"-Xmx{HEAP_MB}m -XX:+UseSerialGC"
    stock = ScienceWorldEnv("", envStepLimit=10**6)
    del os.environ["JAVA_TOOL_OPTIONS"]
    return stock


def lean_against_stock(seconds: float) -> None:
    """The same actions on both, pass by pass, until the time is over."""
    stock, lean, pool = stock_env(), ScienceworldEnv(heap_mb=HEAP_MB), shared_pool(HEAP_MB)
    meters = Meter("stock", stock._gateway.java_process.pid), Meter("lean", pool.pid or 0)

    def stock_pass() -> None:
        for action in ACTIONS:
            stock.step(action)

    def lean_pass() -> None:
        for action in ACTIONS:
            lean.step(action)

    ends = time.perf_counter() + seconds
    warm = True
    while time.perf_counter() < ends or meters[0].steps == 0:
        stock.load(TASK, VARIATION, "easy")
        lean.reset(make_task(TASK, VARIATION, "test"))
        run(meters[0], stock_pass, warm)
        run(meters[1], lean_pass, warm)
        warm = False
    for meter in meters:
        print(meter)
    stock_cpu, lean_cpu = (m.cpu / m.steps for m in meters)
    print(f"lean is {stock_cpu / lean_cpu:.1f} times as fast per CPU second")
    lean.close()
    stock.close()


def run(meter: Meter, one_pass: Callable[[], None], warm: bool) -> None:
    """One measured pass; the first only warms Java up."""
    if warm:
        one_pass()
        return
    with meter.on(len(ACTIONS)):
        one_pass()


def worlds(number: int, seconds: float) -> None:
    """Step a number of worlds in turns."""
    pool = shared_pool(HEAP_MB)
    envs = [ScienceworldEnv(heap_mb=HEAP_MB) for _ in range(number)]
    for env in envs:
        env.reset(make_task(TASK, VARIATION, "test"))
    java = pool.pid or 0
    meter = Meter(f"{number} worlds", java)
    actions, ends = cycle(ACTIONS), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        with meter.on(number):
            action = next(actions)
            for env in envs:
                env.step(action)
    print(f"{meter}, Java {rss_mb(java):.0f} MiB resident")
    for env in envs:
        env.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="per measurement")
    args = parser.parse_args()
    first, again = start_up()
    print(f"start-up {first:.2f} s to the first observation, {again:.2f} s in a running machine")
    for number in NUM_WORLDS:
        worlds(number, args.seconds)
    lean_against_stock(args.seconds)


if __name__ == "__main__":
    main()
