"""How fast the episode viewer opens: from its index, against unpacking every episode at once.

    python tests/bench/bench_episodes.py [--episodes 2000] [--steps 20] [--tokens 2000]

Writes the viewer of made-up episodes (half of them for training, seen by two arms) to a temporary
folder, opens it in headless Chromium from file:// and prints seconds, best of `--repeat`.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import make_step, make_task, make_trajectory
from playwright.sync_api import Browser, sync_playwright

from step_ray.report.episodes import ArmView, Group, write_episodes
from step_ray.types import Message, StepKind

WORDS = [f"{a}{b}" for a in ("mu", "de", "ca", "lam", "sho", "dra") for b in ("g", "sk", "rt", "p")]
PROMPT = Message(role="system", content="Interact with a household to solve a task. " * 40)


def text(rng: random.Random, length: int) -> str:
    words = rng.choices(WORDS, k=length // 5)
    return " ".join(f"{word} {rng.randrange(9)}" if rng.random() < 0.2 else word for word in words)


def episode(number: int, source: str, steps: int):
    rng = random.Random(f"{source}/{number}")
    kinds = rng.choices([StepKind.ACT, StepKind.ERROR, StepKind.CORRECTION], [8, 1, 1], k=steps)
    task = make_task(f"env/split/{number:06}", goal=text(rng, 60), task_type=f"type {number % 6}")
    turns = [
        make_step(f"Thought: {text(rng, 120)}\nAction: {text(rng, 20)}", text(rng, 300), k, index=i)
        for i, k in enumerate(kinds)
    ]
    prompt = (PROMPT, Message(role="user", content=text(rng, 600)))
    name = f"{task.task_id}#{source}#0"
    return make_trajectory(*turns, name=name, task=task, prompt=prompt, success=rng.random() < 0.5)


def groups(args: argparse.Namespace) -> list[Group]:
    half = args.episodes // 2

    def views(trajectory):
        rng = random.Random(trajectory.trajectory_id)
        ids = [min(int(rng.expovariate(1 / 900)), 31999) for _ in range(args.tokens)]
        marks = "".join(rng.choice("ccctttm") * 20 for _ in range(args.tokens // 20))
        return {arm: ArmView(marks="t" * args.steps, ids=ids, token_marks=marks) for arm in "ab"}

    return [
        Group(
            folder=folder,
            kind=kind,
            label=folder,
            episodes=(episode(i, folder, args.steps) for i in range(half)),
            num_shown=half,
            num_total=half,
            views=views if kind == "Collection" else lambda trajectory: {},
        )
        for folder, kind in (("step", "Evaluation"), ("collect", "Collection"))
    ]


def measure(browser: Browser, path: Path) -> dict[str, float]:
    """Seconds of each thing that a reader waits for."""
    page = browser.new_page()
    seconds = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name] = time.perf_counter() - start
        start = time.perf_counter()

    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")
    lap("open")
    page.locator("#list button").nth(150).click()
    page.wait_for_selector("#panes[data-opened]")
    lap("show an episode")
    page.fill("[name=text]", "99")
    page.locator("#list .id").first.wait_for()
    lap("search")
    page.evaluate(
        "Promise.all([...document.querySelectorAll('[id^=chunk-]')].map((e) => unpack(e.id)))"
        ".then((all) => all.length)"
    )
    lap("unpack all")
    page.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in {"episodes": 2000, "steps": 20, "tokens": 2000, "repeat": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "episodes.html"
        start = time.perf_counter()
        number, _ = write_episodes(
            path,
            run="bench",
            run_dir=folder,
            groups=groups(args),
            vocabulary=lambda: {i: f" w{i}" for i in range(32000)},
        )
        written = time.perf_counter() - start
        print(
            f"{number:,} episodes: {path.stat().st_size / 2**20:.1f} MiB, made in {written:.1f} s"
        )
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        runs = [measure(browser, path) for _ in range(args.repeat)]
        browser.close()
    best = {name: min(run[name] for run in runs) for name in runs[0]}
    for name, value in best.items():
        print(f"{name:<16} {value:7.2f} s")
    print(f"open with all unpacked / from the index: {1 + best['unpack all'] / best['open']:.1f}x")


if __name__ == "__main__":
    main()
