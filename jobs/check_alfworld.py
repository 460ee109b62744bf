"""Compare the native ALFWorld engine with the official one over a folder of games.

    python jobs/check_alfworld.py $ALFWORLD_DATA/json_2.1.1/valid_seen --steps 40

Exit code 1 if any text, command list or outcome differs. Needs the extra `alfworld`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from step_ray.envs.alfworld import parity


def main() -> int:
    """Run the comparison and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-games", type=int, help="first N games of the sorted list")
    parser.add_argument("--steps", type=int, default=30, help="length of the random walk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--old-wording", action="store_true", help="rewrite to 'put .. in/on ..'")
    args = parser.parse_args()
    games, report = parity.find_games(args.folder)[: args.num_games], parity.ParityReport()
    with tempfile.TemporaryDirectory() as folder:
        if args.old_wording:
            games = parity.write_old_wording(games, Path(folder))
        for path in parity.compare_games(games, args.steps, args.seed, report):
            print(f"{report.games} {path}: {len(report.mismatches)} mismatches so far")
    for row in report.mismatches[:20]:
        print(row)
    print(f"{report.games} games, {report.episodes} episodes ({report.won} won), ", end="")
    print(f"{report.steps} steps, {len(report.mismatches)} mismatches")
    return 1 if report.mismatches or not report.games else 0


if __name__ == "__main__":
    sys.exit(main())
