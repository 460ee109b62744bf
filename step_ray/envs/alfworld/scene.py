"""Draws rooms and games at random: which receptacles, which objects in them, which goal.

Takes a random generator and knobs, gives frozen records with ready PDDL ids; never writes text or
files and knows nothing of engines. A floor number names one fixed room, as in ALFRED: its
receptacles and their places are a function of the floor and the size range alone, so games on one
floor differ in objects, goal and start only.
"""

from dataclasses import dataclass
from functools import lru_cache
from random import Random

from step_ray.envs.alfworld import tables

_HORIZONS = (-30, 0, 15, 30, 45, 60)
_MAX_TARGETS_AT_GOAL = {"pick_and_place_simple": 0, "pick_two_obj_and_place": 1}
"""How many targets may lie in receptacles of the goal's class while the goal is still false."""


@dataclass(frozen=True, slots=True)
class Receptacle:
    """A piece of furniture; `id` is its PDDL name, `place` its centre in hundredths of a metre."""

    id: str
    cls: str
    location: str
    openable: bool
    place: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Item:
    """An object and the index of the receptacle it lies in."""

    id: str
    cls: str
    host: int


@dataclass(frozen=True, slots=True)
class Room:
    """One floor's furniture and, per object class, the receptacles that may hold it."""

    kind: str
    floor: int
    receptacles: tuple[Receptacle, ...]
    hosts: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Goal:
    """What to do with which class; `parent` is empty for the lamp task, `lamp` for all others."""

    task_type: str
    target: str
    parent: str
    lamp: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole game: room, objects, goal and the agent's first location (at no receptacle)."""

    room: Room
    goal: Goal
    items: tuple[Item, ...]
    start: str


def _coordinate(hundredths: int) -> str:
    sign = "minus" if hundredths < 0 else "plus"
    whole, part = divmod(abs(hundredths), 100)
    return f"_bar__{sign}_{whole:02d}_dot_{part:02d}"


def _entity_id(cls: str, place: tuple[int, int, int]) -> str:
    # Basins are parts of a sink or bathtub: the released names end in the part.
    suffix = f"_bar_{cls}" if cls.endswith("Basin") else ""
    return cls.removesuffix("Basin") + "".join(map(_coordinate, place)) + suffix


def _fresh_location(rng: Random, used: set[str]) -> str:
    while True:
        x, z = rng.randint(-12, 12), rng.randint(-12, 12)
        grid = (x, z, rng.randint(0, 3), rng.choice(_HORIZONS))
        location = "loc" + "".join(f"_bar_{'_minus_' * (n < 0)}{abs(n)}" for n in grid)
        if location not in used:
            used.add(location)
            return location


def _fresh_id(
    rng: Random, cls: str, near: tuple[int, int, int], spread: int, used: set[str]
) -> tuple[str, tuple[int, int, int]]:
    while True:
        x, y, z = (n + rng.randint(-spread, spread) for n in near)
        name = _entity_id(cls, (x, abs(y), z))
        if name not in used:
            used.add(name)
            return name, (x, abs(y), z)


def _pick(rng: Random, weights: dict[str, float], counts: dict[str, int]) -> str:
    """Draw a class; what is there already gets rarer, as in proportional apportionment."""
    names = list(weights)
    return rng.choices(names, [weights[n] / (1 + counts.get(n, 0)) for n in names])[0]


def _furniture(rng: Random, kind: str, num_receptacles: int) -> list[str]:
    """Receptacle classes of a room, the core first."""
    classes = list(tables.CORE_RECEPTACLES[kind])
    weights = dict(tables.RECEPTACLE_RATES[kind])
    counts = dict.fromkeys(classes, 1)
    while len(classes) < num_receptacles:
        for cls in counts.keys() & tables.SINGLE_RECEPTACLES:
            weights.pop(cls, None)
        cls = _pick(rng, weights, counts)
        counts[cls] = counts.get(cls, 0) + 1
        classes.append(cls)
    return classes


@lru_cache(maxsize=256)
def draw_room(kind: str, floor: int, min_receptacles: int, max_receptacles: int) -> Room:
    """The room on a floor: the same arguments always give the same room."""
    rng = Random(f"room/{kind}/{floor}/{min_receptacles}/{max_receptacles}")
    used_ids: set[str] = set()
    used_locations: set[str] = set()
    receptacles = []
    for cls in _furniture(rng, kind, rng.randint(min_receptacles, max_receptacles)):
        name, place = _fresh_id(rng, cls, (0, 0, 0), 350, used_ids)
        openable = rng.random() < tables.OPENABLE_RATE.get(cls, 0.0)
        receptacles.append(
            Receptacle(name, cls, _fresh_location(rng, used_locations), openable, place)
        )
    hosts = {
        obj: tuple(i for i, r in enumerate(receptacles) if tables.may_hold(r.cls, obj))
        for obj in (*tables.OBJECT_RATES[kind], "DeskLamp")
    }
    return Room(kind, floor, tuple(receptacles), {o: h for o, h in hosts.items() if h})


def _hosts_outside(room: Room, target: str, parent: str) -> bool:
    return any(room.receptacles[i].cls != parent for i in room.hosts[target])


def draw_goal(rng: Random, room: Room, task_type: str) -> Goal | None:
    """A goal that the room's furniture allows, or None where it allows none."""
    wanted = tables.PROPERTIES.get(tables.TASK_PROPERTY.get(task_type, ""), None)
    targets = [
        obj
        for obj in room.hosts
        if obj not in tables.FIXED_OBJECTS and (wanted is None or obj in wanted)
    ]
    if task_type == "look_at_obj_in_light":
        if "DeskLamp" not in room.hosts or not targets:
            return None
        return Goal(task_type, rng.choice(targets), "", "DeskLamp")
    tool = tables.TASK_TOOL.get(task_type, ("", ""))[1]
    pairs: dict[str, list[str]] = {}
    for parent in sorted({r.cls for r in room.receptacles} - {tool} - tables.NEVER_DESTINATIONS):
        held = [t for t in targets if t in tables.HOLDS[parent] and _hosts_outside(room, t, parent)]
        if held:
            pairs[parent] = held
    if not pairs:
        return None
    parent = rng.choice(list(pairs))
    return Goal(task_type, rng.choice(pairs[parent]), parent, "")


def _item_classes(rng: Random, room: Room, goal: Goal, num_objects: int) -> list[str]:
    """Object classes of a game: those the goal needs, then a draw by the room's rates."""
    num_targets = 2 if goal.task_type == "pick_two_obj_and_place" else 1
    classes = [goal.target] * num_targets + ([goal.lamp] if goal.lamp else [])
    counts = {cls: classes.count(cls) for cls in classes}
    weights = {o: r for o, r in tables.OBJECT_RATES[room.kind].items() if o in room.hosts}
    while len(classes) < num_objects and weights:
        cls = _pick(rng, weights, counts)
        counts[cls] = counts.get(cls, 0) + 1
        classes.append(cls)
        if counts[cls] >= (1 if cls in tables.FIXED_OBJECTS else tables.MAX_PER_CLASS):
            del weights[cls]
    return classes


def draw_scene(rng: Random, room: Room, goal: Goal, num_objects: int) -> Scene:
    """Fill a room with objects so that the goal is false and can be reached."""
    used_ids: set[str] = {r.id for r in room.receptacles}
    at_goal = 0
    items = []
    for cls in _item_classes(rng, room, goal, num_objects):
        hosts = list(room.hosts[cls])
        if cls == goal.target and at_goal >= _MAX_TARGETS_AT_GOAL.get(goal.task_type, num_objects):
            hosts = [i for i in hosts if room.receptacles[i].cls != goal.parent]
        host = rng.choices(hosts, [tables.LOAD[room.receptacles[i].cls] for i in hosts])[0]
        at_goal += cls == goal.target and room.receptacles[host].cls == goal.parent
        name, _ = _fresh_id(rng, cls, room.receptacles[host].place, 30, used_ids)
        items.append(Item(name, cls, host))
    start = _fresh_location(rng, {r.location for r in room.receptacles})
    return Scene(room, goal, tuple(items), start)
