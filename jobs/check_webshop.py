"""Compare the WebShop simulator with recordings of the official one.

    python jobs/check_webshop.py --data FOLDER [--vectors F] [--episodes F] [--goals F] [--pairs N]

FOLDER holds the official files of the 1,000 products. F: scored purchases (JSON list), AgentGym's
conversations (JSON lines), goals in the official order (JSON lines). --pairs N: the noun tagger on
N random purchases, beside textblob's where that is installed (extra `bench`). Exit code 1 if a
vector, a goal or a page differs otherwise than by its price limit.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from step_ray.envs.webshop import nouncheck, recordings
from step_ray.envs.webshop.catalogue import build_catalogue, open_catalogue

NAMES = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")


def main() -> int:
    """Run the comparisons that files are given for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    for name in recordings.CHECKS:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--pairs", type=int, default=0)
    args, bad = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as tmp:
        catalogue = open_catalogue(build_catalogue(Path(tmp), *(args.data / n for n in NAMES)))
        for name, check in recordings.CHECKS.items():
            bad += check(file, catalogue, print) if (file := getattr(args, name)) else 0
        if args.pairs:
            print("\n".join(nouncheck.report(catalogue, args.pairs, seed=0)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
