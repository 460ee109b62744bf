"""Make the tiny base model: `python jobs/pretrain_base.py --out FOLDER`.

Takes about half an hour on 2 cores. Such a folder is what `student.init: builtin:tiny-base` names.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from step_ray.cluster.raysetup import connected
from step_ray.training.pretrain import PretrainPlan, make_base


def main() -> None:
    """Parse the flags and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="working folder")
    parser.add_argument("--games", type=int, default=PretrainPlan().num_games)
    parser.add_argument("--epochs", type=int, default=PretrainPlan().train.epochs)
    args = parser.parse_args()
    plan = PretrainPlan()
    train = plan.train.model_copy(update={"epochs": args.epochs})
    plan = replace(plan, num_games=args.games, train=train)
    with connected():
        result = make_base(plan, args.work.resolve(), args.out.resolve(), print)
    print(result)


if __name__ == "__main__":
    main()
