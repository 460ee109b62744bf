"""Where objects usually lie, counted over training games: makes `envs/alfworld/usual.py`'s table.

python jobs/usual_places.py $ALFWORLD_DATA/json_2.1.1/train
"""

import argparse
from pathlib import Path

from step_ray.envs.alfworld.parity import find_games
from step_ray.envs.alfworld.problem import load_game
from step_ray.envs.alfworld.usual_count import usual_table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for line in usual_table(map(load_game, find_games(parser.parse_args().folder))):
        print(line)


if __name__ == "__main__":
    main()
