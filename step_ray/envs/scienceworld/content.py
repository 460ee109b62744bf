"""What a variation is made of, as one fingerprint: its goal and every object of its world.

Takes a lent world and a task, gives a digest that two variations share only if they are the same
game under two numbers. It plays nothing.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from step_ray.envs.scienceworld.env import check_range, which
from step_ray.envs.scienceworld.jvm import World
from step_ray.envs.scienceworld.tasks import list_tasks
from step_ray.types import Task

ALL = ""
"""Root of the engine's tree of objects: the whole world."""


def content_fingerprint(world: World, task: Task, simplification: str) -> str:
    """Digest of the goal's text and of all objects with their properties and places.

    The engine numbers objects anew at each load and lists them in no fixed order; both are left
    out.

    Raises:
        EnvError: no such task or variation, or Java fails.
    """
    name, variation = which(task)
    check_range(world, name, variation)
    world.call("load", name, variation, simplification, False)
    tree = _canonical(json.loads(str(world.call("getObjectTree", ALL))))
    goal = " ".join(str(world.call("getTaskDescription")).split())
    return hashlib.sha256(f"{goal}\n{tree}".encode()).hexdigest()


def _canonical(node: dict[str, Any]) -> str:
    """One object as text: its properties in order, then what it holds, sorted."""
    own = {key: value for key, value in node.items() if key not in ("uuid", "contents")}
    inside = sorted(_canonical(child) for child in node["contents"].values())
    return json.dumps(own, sort_keys=True) + "{" + ";".join(inside) + "}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Variations of one task type in training and in a held-out split."""

    train: int
    repeated: int
    """Training variations that are another one under a second number."""
    held_out: int
    shared: int
    """Held-out variations that are in training under another number."""


def overlap(
    world: World, task_type: str, split: str, per_type: int | None, simplification: str
) -> Overlap:
    """Compare a task type's variations of the training split and of another one.

    Args:
        world: a lent world.
        task_type: as in `tables.TASK_TYPES`.
        split: dev or test.
        per_type: only the first so many of each split; None: all.
        simplification: as in the configuration.
    """
    train, other = (
        [
            content_fingerprint(world, task, simplification)
            for task in list_tasks([task_type], name, per_type)
        ]
        for name in ("train", split)
    )
    return Overlap(
        train=len(train),
        repeated=len(train) - len(set(train)),
        held_out=len(other),
        shared=sum(fingerprint in set(train) for fingerprint in other),
    )
