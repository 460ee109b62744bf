"""Compare the WebShop simulator with recordings of the official one.

    python jobs/check_webshop.py --data FOLDER [--vectors F] [--episodes F] [--goals F] [--pairs N]

FOLDER holds the official files of the 1,000 products. F: scored purchases (JSON list), AgentGym's
conversations (JSON lines), goals in the official order (JSON lines). `--pairs N` measures the noun
tagger on N random purchases; next to textblob's tagger where that is installed (extra `bench`).
Exit code 1 if a vector, a goal or a page differs otherwise than by its price limit.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from step_ray.envs.webshop import nouncheck, replay
from step_ray.envs.webshop.catalogue import Catalogue, build_catalogue, open_catalogue
from step_ray.envs.webshop.goals import list_goals


def main() -> int:
    """Run the comparisons that files are given for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    for name in ("--vectors", "--episodes", "--goals"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--pairs", type=int, default=0)
    args = parser.parse_args()
    names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
    with tempfile.TemporaryDirectory() as folder:
        catalogue = open_catalogue(
            build_catalogue(Path(folder), *(args.data / name for name in names))
        )
        bad = check_vectors(args.vectors, catalogue) if args.vectors else 0
        bad += check_goals(args.goals, catalogue) if args.goals else 0
        bad += check_episodes(args.episodes, catalogue) if args.episodes else 0
        if args.pairs:
            print("\n".join(nouncheck.report(catalogue, args.pairs, seed=0)))
    return 1 if bad else 0


def check_vectors(path: Path, catalogue: Catalogue) -> int:
    """Reward vectors; gives how many differ."""
    vectors = json.loads(path.read_text(encoding="utf-8"))
    checked = ((number, replay.check_vector(v, catalogue)) for number, v in enumerate(vectors))
    wrong = [(number, faults) for number, faults in checked if faults]
    for number, faults in wrong[:10]:
        print(f"vector {number}: {', '.join(faults)}")
    print(f"reward: {len(vectors) - len(wrong)} of {len(vectors)} purchases as recorded")
    return len(wrong)


def check_goals(path: Path, catalogue: Catalogue) -> int:
    """Goals in the official order; gives how many differ."""
    recorded = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ours = list_goals(catalogue, "synthetic", 0)
    same = sum(
        (g.asin, dict(g.options), list(g.attributes))
        == (r["asin"], r["goal_options"], r["attributes"])
        for g, r in zip(ours, recorded, strict=False)
    )
    print(f"goals: {same} of {len(recorded)} in their place, {len(ours)} ours")
    return max(len(recorded), len(ours)) - same


def check_episodes(path: Path, catalogue: Catalogue) -> int:
    """Searches and whole episodes; gives how many observations differ beyond the price limit."""
    episodes = list(replay.read_episodes(path))
    found = replay.compare_searches([turns for _, turns in episodes], catalogue)
    number = max(found.searches, 1)
    print(
        f"searches: {found.searches}, same first hit {100 * found.first_same / number:.2f} %,"
        f" same page in order {100 * found.all_same / number:.2f} %,"
        f" mean overlap of the first ten {found.overlap / number:.4f}"
    )
    goals, beyond = list_goals(catalogue, "synthetic", 0), 0
    for recorded_limits in (False, True):
        report = replay.replay(episodes, goals, catalogue, recorded_limits)
        limits = "recorded" if recorded_limits else "our own"
        print(f"replay of {report.episodes} episodes with {limits} price limits:")
        for kind, count in report.steps.most_common():
            print(f"  {count:6} {kind} (first: {report.examples[kind]})")
        harmless = {"identical"} if recorded_limits else {"identical", replay.PRICE_LIMIT}
        beyond += report.steps.total() - sum(report.steps[kind] for kind in harmless)
    return beyond


if __name__ == "__main__":
    sys.exit(main())
