"""Make ScienceWorld's gold paths of a split once, in parallel; what is cached is left alone.

    ray job submit --working-dir . -- python jobs/gold.py --config C.yaml --set ray.address=auto

A run makes the paths that it needs by itself; this job makes them ahead. Exit code 1 if any fails.
"""

import argparse
import sys
from pathlib import Path

from step_ray.collect import row_mapper
from step_ray.config import load_config
from step_ray.envs.scienceworld import goldcache
from step_ray.envs.scienceworld.tasks import list_tasks
from step_ray.raysetup import connected


def main() -> int:
    """Parse the flags, make the paths, print one line for each that fails and a sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--split", choices=("train", "dev", "test"), default="train")
    parser.add_argument("--per-type", type=int, help="only the first N variations of each type")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    section, folder = config.env.scienceworld, goldcache.gold_dir(config)
    tasks = list_tasks(config.env.task_types, args.split, args.per_type)
    keys = [goldcache.key_of(task) for task in tasks]
    with connected(config.ray):
        mapper = row_mapper(config.collect)
        paths = goldcache.fill(folder, keys, section.simplification, section.heap_mb, mapper)
    bad = [path for path in paths.values() if path.score < goldcache.FULL_SCORE]
    for path in bad:
        print(f"{path.task} {path.variation}: {path.error or f'reaches {path.score}'}")
    print(f"{len(paths) - len(bad)} of {len(paths)} paths reach the full score, in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
