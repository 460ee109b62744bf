"""Turns a scene into PDDL problem text, and a problem text into a fingerprint of its content.

Gives text only; never draws anything and never reads or writes files. The text follows the released
ALFWorld problems (same domain, predicates and goal forms), so the official engine loads it too.
"""

import re
from collections.abc import Iterable, Iterator
from hashlib import sha256

from step_ray.envs.alfworld import tables
from step_ray.envs.alfworld.scene import Goal, Scene

_DOMAIN_OTYPES = frozenset({"SinkType", "KnifeType", "ButterKnifeType"})
_DOMAIN_RTYPES = frozenset({"SinkBasinType", "MicrowaveType", "FridgeType"})
"""Types the domain names in its actions: every problem has to declare them."""

_STATES = {"cleanable": "isClean", "heatable": "isHot", "coolable": "isCool"}
_PLACE = "receptacleType"
_FACT = re.compile(
    rf"\(\s*(objectType|{_PLACE}|inReceptacle|inReceptacleObject)\s+(\S+)\s+([^\s()]+)\s*\)"
)


def _place_goal(goal: Goal) -> str:
    types = f"(objectType ?o {goal.target}Type) (receptacleType ?r {goal.parent}Type)"
    predicate = tables.TASK_PROPERTY.get(goal.task_type)
    if predicate is None:
        conditions = f"(inReceptacle ?o ?r) {types}"
    else:
        conditions = f"({predicate} ?o) {types} ({_STATES[predicate]} ?o) (inReceptacle ?o ?r)"
    return f"(exists (?r - receptacle) (exists (?o - object) (and {conditions})))"


def _two_goal(goal: Goal) -> str:
    def placed(var: str) -> str:
        return (
            f"(objectType {var} {goal.target}Type) (receptacleType ?r {goal.parent}Type)"
            f" (inReceptacle {var} ?r)"
        )

    return (
        f"(exists (?r - receptacle) (exists (?o1 - object) (and {placed('?o1')}"
        f" (exists (?o2 - object) (and (not (= ?o1 ?o2)) {placed('?o2')})))))"
    )


def _lamp_goal(goal: Goal) -> str:
    return (
        "(exists (?ot - object ?r - receptacle ?a - agent ?l - location)"
        f" (and (objectType ?ot {goal.lamp}Type) (toggleable ?ot) (isToggled ?ot)"
        " (receptacleAtLocation ?r ?l) (atLocation ?a ?l) (inReceptacle ?ot ?r)))"
        " (exists (?o - object ?a - agent)"
        f" (and (objectType ?o {goal.target}Type) (holds ?a ?o)))"
    )


def goal_pddl(goal: Goal) -> str:
    """The `(:goal ...)` expression of a goal, in the released games' form."""
    if goal.lamp:
        body = _lamp_goal(goal)
    elif goal.task_type == "pick_two_obj_and_place":
        body = _two_goal(goal)
    else:
        body = _place_goal(goal)
    return f"(:goal (and {body}))"


def goal_text(goal: Goal, form: int) -> str:
    """One of the two goal sentences (`form` 0 or 1), without the full stop."""
    return tables.GOAL_TEXTS[goal.task_type][form].format(
        obj=goal.target.lower(), recep=goal.parent.lower(), lamp=goal.lamp.lower()
    )


def _declarations(scene: Scene) -> Iterator[str]:
    yield "agent1 - agent"
    otypes = {f"{i.cls}Type" for i in scene.items} | _DOMAIN_OTYPES
    rtypes = {f"{r.cls}Type" for r in scene.room.receptacles} | _DOMAIN_RTYPES
    yield from (f"{t} - otype" for t in sorted(otypes))
    yield from (f"{t} - rtype" for t in sorted(rtypes))
    yield from (f"{i.id} - object" for i in scene.items)
    yield from (f"{r.id} - receptacle" for r in scene.room.receptacles)
    locations = {r.location for r in scene.room.receptacles} | {scene.start}
    yield from (f"{location} - location" for location in sorted(locations))


def _facts(scene: Scene) -> Iterator[str]:
    receptacles, items = scene.room.receptacles, scene.items
    yield from (f"(receptacleType {r.id} {r.cls}Type)" for r in receptacles)
    yield from (f"(objectType {i.id} {i.cls}Type)" for i in items)
    present = {i.cls for i in items}
    for cls in sorted({r.cls for r in receptacles}):
        for obj in sorted(tables.HOLDS[cls] & present):
            yield f"(canContain {cls}Type {obj}Type)"
    yield from (f"(pickupable {i.id})" for i in items if i.cls not in tables.FIXED_OBJECTS)
    yield from (f"(openable {r.id})" for r in receptacles if r.openable)
    yield f"(atLocation agent1 {scene.start})"
    for predicate, classes in tables.PROPERTIES.items():
        yield from (f"({predicate} {i.id})" for i in items if i.cls in classes)
    yield from (f"(inReceptacle {i.id} {receptacles[i.host].id})" for i in items)
    yield from (f"(receptacleAtLocation {r.id} {r.location})" for r in receptacles)
    yield from (f"(objectAtLocation {i.id} {receptacles[i.host].location})" for i in items)


def problem_text(scene: Scene, name: str) -> str:
    """The PDDL problem of a scene; `name` is the trial's name."""

    def block(keyword: str, lines: Iterable[str]) -> str:
        return f"({keyword}\n" + "".join(f"    {line}\n" for line in lines) + ")\n"

    return (
        f"(define (problem plan_{name})\n(:domain alfred)\n"
        + block(":objects", _declarations(scene))
        + block(":init", _facts(scene))
        + goal_pddl(scene.goal)
        + "\n)\n"
    )


def _balanced(text: str) -> str:
    """The first parenthesised expression of `text`, white space normalised."""
    depth, tokens = 0, []
    for token in re.findall(r"[()]|[^\s()]+", text):
        tokens.append(token)
        depth += (token == "(") - (token == ")")
        if depth == 0:
            break
    return " ".join(tokens)


def _digest(places: Iterable[tuple[str, list[str]]], goal: str) -> str:
    layout = sorted((cls, *sorted(objects)) for cls, objects in places)
    return sha256(repr((layout, _balanced(goal))).encode()).hexdigest()


def scene_fingerprint(scene: Scene) -> str:
    """`game_fingerprint` of the scene's problem text, without writing the text."""
    contents: list[list[str]] = [[] for _ in scene.room.receptacles]
    for item in scene.items:
        contents[item.host].append(f"{item.cls}Type")
    classes = (f"{r.cls}Type" for r in scene.room.receptacles)
    return _digest(zip(classes, contents, strict=True), goal_pddl(scene.goal))


def game_fingerprint(problem_text: str) -> str:
    """A hash of what can be found in the game and what is asked, for leakage checks.

    Covers the class of every receptacle, the classes of the objects in it (and in containers) and
    the goal. Does not see ids, coordinates, numbering, fact order, the start, the sentence form of
    the goal, or objects that lie in no receptacle; works on released and generated games alike.

    Args:
        problem_text: The `pddl_problem` of a game file.

    Returns:
        64 hexadecimal digits.
    """
    init, goal = problem_text.split("(:goal", 1)
    facts = _FACT.findall(init)
    classes = {name: cls for predicate, name, cls in facts if predicate.endswith("Type")}
    contents: dict[str, list[str]] = {n: [] for predicate, n, _ in facts if predicate == _PLACE}
    for predicate, obj, host in facts:
        if not predicate.endswith("Type"):
            contents.setdefault(host, []).append(classes.get(obj, ""))
    places = ((classes.get(host, ""), objects) for host, objects in contents.items())
    return _digest(places, f"(:goal{goal}")
