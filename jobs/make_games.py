"""Generate ALFWorld games: `python jobs/make_games.py --out DIR --split train --num 1000`."""

import argparse
import sys
from pathlib import Path

from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.envs.alfworld.tables import SPLITS
from step_ray.errors import StepRayError


def main() -> int:
    """Parse the flags, generate, print how many games lie where; the exit code is the return."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for json_2.1.1/")
    parser.add_argument("--split", default="train", help=", ".join(SPLITS))
    parser.add_argument("--num", type=int, required=True, help="number of games")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="small", help="tiny, small or full")
    parser.add_argument("--official", action="store_true", help="for the official engine too")
    args = parser.parse_args()
    try:
        spec = GeneratorSpec(
            seed=args.seed,
            split=args.split,
            num_games=args.num,
            size=args.size,
            official=args.official,
        )
        paths = generate_games(spec, args.out)
    except StepRayError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    print(f"{len(paths)} games in {args.out / 'json_2.1.1' / args.split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
