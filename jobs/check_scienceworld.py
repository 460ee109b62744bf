"""Count ScienceWorld's held-out variations that are a training variation under another number.

    python jobs/check_scienceworld.py --split test --per-type 20

Two variations are the same if goal, start and every object are. Needs the extra `scienceworld`.
"""

import argparse

from step_ray.env_config import ScienceworldConfig
from step_ray.envs.scienceworld import tables
from step_ray.envs.scienceworld.content import content_fingerprint
from step_ray.envs.scienceworld.jvm import shared_pool
from step_ray.envs.scienceworld.tasks import list_tasks


def main() -> None:
    """Print one line a task type and a sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--per-type", type=int, help="first N variations of each type and split")
    parser.add_argument("--types", nargs="+", choices=tables.TASK_TYPES, default=tables.TASK_TYPES)
    args = parser.parse_args()
    section = ScienceworldConfig()
    world = shared_pool(section.heap_mb).lend()
    twins = held_out = 0
    for task_type in args.types:
        train, other = (
            [
                content_fingerprint(world, task, section.simplification)
                for task in list_tasks([task_type], split, args.per_type)
            ]
            for split in ("train", args.split)
        )
        same = sum(fingerprint in set(train) for fingerprint in other)
        repeated = len(train) - len(set(train))
        twins, held_out = twins + same, held_out + len(other)
        print(
            f"{task_type}: {len(train)} train ({repeated} repeated), {len(other)} {args.split},",
            end="",
        )
        print(f" {same} of these in train", flush=True)
    print(f"{twins} of {held_out} {args.split} variations are in train")


if __name__ == "__main__":
    main()
