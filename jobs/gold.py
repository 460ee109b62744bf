"""Make ScienceWorld's gold paths of a split once, in parallel; what is cached is left alone.

    ray job submit --working-dir . -- python jobs/gold.py --config C.yaml ray.address=auto

A run makes those that it needs by itself; this job makes them ahead. Exit code 1 if any fails.
"""

import argparse
import sys

from step_ray.cluster.raysetup import connected
from step_ray.collect import row_mapper
from step_ray.config import load_config
from step_ray.envs.scienceworld import goldcache
from step_ray.envs.scienceworld.tasks import list_tasks


def main() -> int:
    """Parse the flags, make the paths, print one line for each that fails and a sum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--split", choices=("train", "dev", "test"), default="train")
    parser.add_argument("--per-type", type=int, help="only the first N variations of each type")
    parser.add_argument("overrides", metavar="A.B=C", nargs="*")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    section, folder = config.env.scienceworld, goldcache.gold_dir(config)
    tasks = list_tasks(config.env.task_types, args.split, args.per_type)
    wanted = (list(map(goldcache.key_of, tasks)), section.simplification, section.heap_mb)
    with connected(config.ray):
        paths = goldcache.fill(folder, *wanted, row_mapper(config.collect))
    bad = [path for path in paths.values() if path.score < goldcache.FULL_SCORE]
    for path in bad:
        print(f"{path.task} {path.variation}: {path.error or f'reaches {path.score}'}")
    print(f"{len(paths) - len(bad)} of {len(paths)} paths reach the full score, in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
