"""The scripted solution of a generated game: a plan by construction, without search.

Takes a scene, gives the commands of a short solution; never executes anything.
Knowing where everything lies, the plan fetches, treats and places the target. Whether the plan wins
is the engine's word (`generator` plays it before a game is written).
"""

from step_ray.envs.alfworld import tables
from step_ray.envs.alfworld.problem import number_names
from step_ray.envs.alfworld.scene import Item, Receptacle, Scene


class _Planner:
    """Appends commands while it keeps track of where the agent is and what is open."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        ids = [r.id for r in scene.room.receptacles] + [i.id for i in scene.items]
        shown = number_names(entity.lower() for entity in ids)  # engines read ids in lower case
        self.names = {entity: shown[entity.lower()] for entity in ids}
        self.at: Receptacle | None = None
        self.opened: set[str] = set()
        self.commands: list[str] = []

    def host(self, item: Item) -> Receptacle:
        return self.scene.room.receptacles[item.host]

    def cost(self, receptacle: Receptacle) -> tuple[int, str]:
        """Commands needed before the receptacle can be used; the name breaks ties."""
        closed = receptacle.openable and receptacle.id not in self.opened
        return (receptacle is not self.at) + closed, self.names[receptacle.id]

    def nearest(self, cls: str) -> Receptacle:
        return min((r for r in self.scene.room.receptacles if r.cls == cls), key=self.cost)

    def go(self, receptacle: Receptacle, *, open_it: bool) -> None:
        if receptacle is not self.at:
            self.commands.append(f"go to {self.names[receptacle.id]}")
            self.at = receptacle
        if open_it and receptacle.openable and receptacle.id not in self.opened:
            self.commands.append(f"open {self.names[receptacle.id]}")
            self.opened.add(receptacle.id)

    def take(self, item: Item) -> None:
        self.go(self.host(item), open_it=True)
        self.commands.append(f"take {self.names[item.id]} from {self.names[self.host(item).id]}")

    def treat(self, item: Item, verb: str, tool: Receptacle) -> None:
        self.go(tool, open_it=False)
        self.commands.append(f"{verb} {self.names[item.id]} with {self.names[tool.id]}")

    def place(self, item: Item, receptacle: Receptacle) -> None:
        self.go(receptacle, open_it=True)
        self.commands.append(f"move {self.names[item.id]} to {self.names[receptacle.id]}")

    def use_lamp(self, lamp: Item) -> None:
        self.go(self.host(lamp), open_it=False)
        self.commands.append(f"use {self.names[lamp.id]}")


def scripted_plan(scene: Scene) -> list[str]:
    """Commands that win the scene from its start."""
    planner, goal = _Planner(scene), scene.goal
    targets = [i for i in scene.items if i.cls == goal.target]
    if goal.lamp:
        planner.take(targets[0])
        planner.use_lamp(next(i for i in scene.items if i.cls == goal.lamp))
    elif goal.task_type == "pick_two_obj_and_place":
        _place_two(planner, targets)
    else:
        planner.take(targets[0])
        if goal.task_type in tables.TASK_TOOL:
            verb, tool = tables.TASK_TOOL[goal.task_type]
            planner.treat(targets[0], verb, planner.nearest(tool))
        planner.place(targets[0], planner.nearest(goal.parent))
    return planner.commands


def _place_two(planner: _Planner, targets: list[Item]) -> None:
    """Bring two targets together in one receptacle; one of them may be there already."""
    parent = planner.scene.goal.parent
    there = [i for i in targets if planner.host(i).cls == parent]
    away = [i for i in targets if planner.host(i).cls != parent]
    receptacle = planner.host(there[0]) if there else None
    for item in away[: 2 - len(there)]:
        planner.take(item)
        receptacle = receptacle or planner.nearest(parent)
        planner.place(item, receptacle)
