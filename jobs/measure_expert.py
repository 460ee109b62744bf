"""Success, mean reward and mean steps of an environment's expert, per task type.

    python jobs/measure_expert.py $ALFWORLD_DATA/json_2.1.1/valid_seen
    python jobs/measure_expert.py --config C.yaml --split train --num-tasks 500 [--set A.B=C]

A folder holds ALFWorld games; a configuration names any environment and its tasks.
"""

import argparse
from pathlib import Path

from step_ray.collection.expert_scores import config_tasks, expert_table, game_tasks, sample
from step_ray.config import load_config, parse_config


def main() -> None:
    """Play and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="ALFWorld games")
    parser.add_argument("--config", type=Path, help="instead of a folder")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    parser.add_argument("--split", help="train or a held-out one; default: the first configured")
    parser.add_argument("--num-tasks", type=int, help="random ones; default: all")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="which tasks")
    args = parser.parse_args()
    if (args.folder is None) == (args.config is None):
        parser.error("give a folder of ALFWorld games or --config")
    if args.folder is not None:
        config, tasks = parse_config({"name": "expert"}), game_tasks(args.folder)
    else:
        config = load_config(args.config, args.overrides)
        tasks = config_tasks(config, args.split or config.tasks.eval_splits[0])
    for line in expert_table(config, sample(tasks, args.num_tasks, args.seed), args.max_steps):
        print(line)


if __name__ == "__main__":
    main()
