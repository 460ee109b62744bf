"""What a variation is made of, as one fingerprint: its goal and every object of its world.

Takes a lent world and a task, gives a digest that two variations share only if they are the same
game under two numbers. It plays nothing.
"""

import hashlib
import json
from typing import Any

from step_ray.envs.scienceworld.env import check_range, which
from step_ray.envs.scienceworld.jvm import World
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
