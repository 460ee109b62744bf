"""WebShop: page steps per second, search latency, load time and memory, by size of the shop.

    python tests/bench/bench_webshop.py [--data $WEBSHOP_DATA] [--synthetic 100000] [--seconds 5]

`--data` measures the 1,000 products, `--synthetic N` a shop of N products whose texts are mixed
from those (or from generated ones): what grows with the number of products is stated for each.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from step_ray.envs.webshop.catalogue import Catalogue, build_catalogue
from step_ray.envs.webshop.generator import generate_shop
from step_ray.envs.webshop.goals import list_goals
from step_ray.envs.webshop.pages import as_text, clickables
from step_ray.envs.webshop.session import Session

FILES = ("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json")


def source_files(data: Path | None, folder: Path) -> list[Path]:
    """The three official files: the released 1,000 products, or 1,000 generated ones."""
    if data is None:
        generate_shop(folder, 1000, 0)
        return [folder / name for name in FILES]
    names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
    return [data / name for name in names]


def mixed_files(files: list[Path], number: int, folder: Path) -> list[Path]:
    """A shop of `number` products: texts from three products each, and a word of its own."""
    products = json.loads(files[0].read_text())
    notes, rng = json.loads(files[1].read_text()), random.Random(0)
    folder.mkdir(parents=True)
    with (folder / FILES[0]).open("w") as out:
        for row in range(number):
            a, b, c = (rng.choice(products) for _ in range(3))
            words = [*a["name"].split(), *b["name"].split()]
            own = {"asin": f"S{row:09}", "name": " ".join([*rng.choices(words, k=10), f"w{row:x}"])}
            mixed = a | {"full_description": b["full_description"]} | own
            mixed |= {"small_description": c["small_description"]}
            out.write(("[" if not row else ",\n") + json.dumps(mixed))
        out.write("]")
    few = {f"S{row:09}": note for row, note in enumerate(notes.values()) if row < number}
    (folder / FILES[1]).write_text(json.dumps(few))
    (folder / FILES[2]).write_text("{}")
    return [folder / name for name in FILES]


def rss_mb() -> float:
    """Resident memory of this process, MiB, and how much of it is its own."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def measure(folder: Path, seconds: float) -> dict[str, float]:
    """Open a catalogue and use it: load, searches, pages."""
    before, begun = rss_mb(), time.perf_counter()
    catalogue = Catalogue(folder)
    loaded = time.perf_counter() - begun
    goals = [goal.instruction for goal in list_goals(catalogue, "synthetic", 0)[:400]]
    spent = []
    for text in goals:
        begun = time.perf_counter()
        catalogue._searched(text)
        spent.append(time.perf_counter() - begun)
    after = rss_mb()
    return {
        "load, ms": 1e3 * loaded,
        "search median, ms": 1e3 * median(spent),
        "search p95, ms": 1e3 * quantiles(spent, n=20)[18],
        "page steps/s": page_steps(catalogue, goals, seconds, searches=False),
        "steps/s, a search in 5": page_steps(catalogue, goals, seconds, searches=True),
        "own memory after load and 400 searches, MiB": after - before,
        "own memory after all, MiB": rss_mb() - before,
    }


def page_steps(catalogue: Catalogue, goals: list[str], seconds: float, searches: bool) -> float:
    """Steps per second of CPU of a random visitor: action, page, its text, its clickables."""
    rng, steps = random.Random(0), 0
    session = Session(catalogue, goals[0])
    session.do(f"search[{goals[0]}]")
    begun = time.process_time()
    while (spent := time.process_time() - begun) < seconds:
        if searches and steps % 5 == 0:
            action = f"search[{goals[steps // 5 % len(goals)]}]"
        else:
            names = [name for name in clickables(session.page()) if name not in AVOID]
            action = f"click[{rng.choice(names)}]"
        session.do(action)
        as_text(session.page())
        steps += 1
        if session.state.number > 5:
            session = Session(catalogue, goals[steps % len(goals)])
            session.do(f"search[{goals[0]}]")
    return steps / spent


AVOID = {"buy now", "back to search", "search"}
"""Clicks that would end the visit, or leave only a search to do."""


def convert(files: list[Path], folder: Path) -> None:
    """Convert in a process of its own, so that its peak memory is its own."""
    begun = time.perf_counter()
    code = (
        "import sys, resource; from pathlib import Path;"
        "from step_ray.envs.webshop.catalogue import build_catalogue as b;"
        "b(*map(Path, sys.argv[1:]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    paths = [str(path) for path in (folder, *files)]
    run = subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True)
    print(f"  converted in {time.perf_counter() - begun:.1f} s, peak {int(run.stdout)} MiB")


def show(files: list[Path], work: Path, seconds: float) -> None:
    convert(files, work)
    folder = build_catalogue(work, *files)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"  input {files[0].stat().st_size >> 20} MiB, on disk {size / 2**20:.1f} MiB")
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from bench_webshop import measure;"
        "print(json.dumps(measure(Path(sys.argv[2]), float(sys.argv[3]))))"
    )
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", code, here, str(folder), str(seconds)],
        check=True,
        capture_output=True,
    )
    for name, value in json.loads(run.stdout.splitlines()[-1]).items():
        print(f"  {name}: {value:,.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--synthetic", type=int, nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = source_files(args.data, Path(folder) / "source")
        print(f"1000 {'released' if args.data else 'generated'} products")
        show(files, Path(folder) / "small", args.seconds)
        for number in args.synthetic:
            print(f"{number} synthetic products")
            mixed = mixed_files(files, number, Path(folder) / f"mixed{number}")
            show(mixed, Path(folder) / f"large{number}", args.seconds)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"largest child process: {peak} MiB")


if __name__ == "__main__":
    main()
