"""Reads a `game.tw-pddl` file into a `Game`: immutable facts, names and texts of one game.

Takes a path; gives facts as the official engine would see them (lower case, its numbering of
names). Knows nothing of commands and never plays.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_ray.envs.alfworld.goal import Facts, Formula, GoalBuilder, parse_goal, typed_names
from step_ray.envs.alfworld.text import Wording, read_goal, read_wording, respell
from step_ray.errors import DataError

CHANGING = frozenset(
    {"atlocation", "opened", "inreceptacle", "not_inreceptacle", "objectatlocation"}
    | {"holds", "holdsany", "isclean", "ishot", "iscool", "ison", "istoggled", "issliced"}
)
"""Predicates that commands change. not_inreceptacle: 'was taken from there', a fact of its own
in the official engine, which lists what stands next to a receptacle by it."""

FIXED = frozenset(
    {"receptacleatlocation", "receptacletype", "cancontain", "objecttype", "pickupable", "openable"}
    | {"cleanable", "heatable", "coolable", "sliceable", "toggleable", "moveable", "examined"}
    | {"isreceptacleobject", "inreceptacleobject", "isreceptacleobjectfull", "wasinreceptacle"}
    | {"checked", "full", "holdsanyreceptacleobject"}
)
"""The other predicates of ALFWorld's domain, which commands here never change."""
_UNTRACKED = frozenset({"checked"})
_DEFAULT_CLEANERS = frozenset({"sinktype", "sinkbasintype"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """One game; share it freely between engines and threads."""

    game_id: str
    """'<task folder>/<trial folder>'."""
    path: Path
    goal: str
    """'Your task is to: ...'"""
    task_type: str
    walkthrough: tuple[str, ...]
    """Commands known to win, in this game's wording; empty where the file has none."""
    solvable: bool
    wording: Wording
    names: Mapping[str, str]
    """Shown name of every entity."""
    agent: str
    facts: Facts = field(repr=False)
    """Facts of the initial state, changing or not."""
    goal_formula: Formula = field(repr=False)
    places: Mapping[str, str] = field(repr=False)
    """Location of every receptacle, receptacles sorted by id."""
    receptacles_at: Mapping[str, tuple[str, ...]] = field(repr=False)
    accepts: Mapping[str, frozenset[str]] = field(repr=False)
    """Objects that may be put into a receptacle."""
    washers: frozenset[str] = field(repr=False)
    """Receptacles that clean; `heaters`, `coolers` likewise."""
    heaters: frozenset[str] = field(repr=False)
    coolers: frozenset[str] = field(repr=False)
    knives: frozenset[str] = field(repr=False)
    travel: tuple[tuple[str, str], ...] = field(repr=False)
    """('go to ...', receptacle) for every receptacle."""


def load_game(path: str | Path) -> Game:
    """Parse one game file.

    Raises:
        DataError: the file is missing, is not a game, or needs rules this engine does not have.
    """
    path = Path(path)
    try:
        return _game(path, _read_json(path))
    except DataError as exc:
        raise DataError(f"{path}: {exc}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        first_line = str(exc).splitlines()[0]
        raise DataError(f"not a readable game file ({type(exc).__name__}: {first_line})") from None
    if not isinstance(data, dict) or not isinstance(data.get("pddl_problem"), str):
        raise DataError("no text under 'pddl_problem'; is this a game.tw-pddl file?")
    return data


def _game(path: Path, data: Mapping[str, Any]) -> Game:
    domain, grammar = str(data.get("pddl_domain") or ""), str(data.get("grammar") or "")
    wording = read_wording(grammar, domain)
    objects, init, goal = _sections(data["pddl_problem"])
    types, facts = typed_names(objects.split()), _facts(init)
    if unknown := sorted(facts.keys() - CHANGING - FIXED):
        raise DataError(f"pddl_problem: the predicate {unknown[0]!r} is not of ALFWorld's domain")
    if "inreceptacleobject" in goal:
        raise DataError("pddl_problem: the goal is a movable receptacle; ALFWorld leaves these out")
    entities = {term for rows in facts.values() for row in rows for term in row}
    if undeclared := sorted(entities - types.keys()):
        raise DataError(f"pddl_problem: {undeclared[0]!r} is used but not declared in :objects")
    names = number_names(entities)
    places = _places(facts)
    formula = GoalBuilder(types, facts, CHANGING, _UNTRACKED).build(parse_goal(goal))
    return Game(
        game_id=f"{path.parent.parent.name}/{path.parent.name}",
        path=path,
        goal=read_goal(grammar),
        task_type=_task_type(goal),
        walkthrough=tuple(_playable(c, names, wording) for c in data.get("walkthrough") or ()),
        solvable=bool(data.get("solvable", True)),
        wording=wording,
        names=names,
        agent=_agent(facts),
        facts=facts,
        goal_formula=formula,
        places=places,
        receptacles_at=_group(places),
        accepts=_accepts(facts),
        washers=_of_type(facts, "receptacletype", _cleaners(domain)),
        heaters=_of_type(facts, "receptacletype", {"microwavetype"}),
        coolers=_of_type(facts, "receptacletype", {"fridgetype"}),
        knives=_of_type(facts, "objecttype", {"knifetype", "butterknifetype"}),
        travel=tuple((f"go to {names[r]}", r) for r in places),
    )


def number_names(entities: Iterable[str]) -> dict[str, str]:
    """Give every entity its shown name, 'cabinet 3', as the official name wrapper does.

    Ids are `cabinet_bar_<position>`. The ids of one class, in alphabetical order, are numbered
    downwards: the first gets the highest number. An id without '_bar_' keeps its name and gets a
    trailing blank (so no command that ends with it can ever be typed).
    """
    ids = sorted(entities)
    left = Counter(_class_name(entity) for entity in ids if "_bar_" in entity)
    names = {}
    for entity in ids:
        if "_bar_" not in entity:
            names[entity] = f"{entity} "
            continue
        kind = _class_name(entity)
        names[entity] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _playable(command: str, names: Mapping[str, str], wording: Wording) -> str:
    """Make a walkthrough command one that can be typed: half of the published files hold ids."""
    words = [names.get(word, word) if "_bar_" in word else word for word in command.split(" ")]
    return respell(" ".join(words), wording)


def _class_name(entity: str) -> str:
    return entity.split("_bar_", 1)[0] + ("basin" if "basin" in entity else "")


def _sections(problem: str) -> tuple[str, str, str]:
    """Split a problem into the insides of :objects and :init, and the whole (:goal ...)."""
    text = re.sub(r";[^\n]*", "", problem).lower()
    starts = [text.find(key) for key in ("(:objects", "(:init", "(:goal")]
    if not 0 <= starts[0] < starts[1] < starts[2]:
        raise DataError("pddl_problem: needs (:objects, (:init, (:goal in this order")
    objects = text[starts[0] + len("(:objects") : starts[1]].strip().removesuffix(")")
    return objects, text[starts[1] + len("(:init") : starts[2]], text[starts[2] :]


def _facts(init: str) -> dict[str, frozenset[tuple[str, ...]]]:
    if "(=" in init or "(not" in init:  # numbers and explicit falsehoods carry nothing we need
        init = re.sub(r"\((?:=|not)\s*\([^()]*\)[^()]*\)", "", init)
    rows: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for fact in re.findall(r"\(([^()]+)\)", init):
        predicate, *terms = fact.split()
        rows[predicate].add(tuple(terms))
    return {predicate: frozenset(found) for predicate, found in rows.items()}


def _agent(facts: Facts) -> str:
    rows = sorted(facts.get("atlocation", ()))
    if len(rows) != 1:
        raise DataError(f"pddl_problem: {len(rows)} (atLocation agent place) facts; needs one")
    if facts.get("holds") or facts.get("holdsany"):
        raise DataError("pddl_problem: the agent holds something at the start; not supported")
    return rows[0][0]


def _places(facts: Facts) -> dict[str, str]:
    rows = sorted(facts.get("receptacleatlocation", ()))
    places = {receptacle: place for receptacle, place in rows}  # noqa: C416 - typed unpacking
    if len(places) != len(rows):
        raise DataError("pddl_problem: a receptacle has two locations; not supported")
    return places


def _group(places: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    at: dict[str, list[str]] = defaultdict(list)
    for receptacle, place in places.items():
        at[place].append(receptacle)
    return {place: tuple(found) for place, found in at.items()}


def _accepts(facts: Facts) -> dict[str, frozenset[str]]:
    """Objects each receptacle may hold; receptacles of one type share one set."""
    rules = facts.get("cancontain", frozenset())
    by_type = {
        kind: _of_type(facts, "objecttype", {row[1] for row in rules if row[0] == kind})
        for kind in {row[0] for row in rules}
    }
    accepts: dict[str, frozenset[str]] = {}
    for receptacle, kind in facts.get("receptacletype", ()):
        known, more = accepts.get(receptacle), by_type.get(kind, frozenset())
        accepts[receptacle] = more if known is None else known | more
    return accepts


def _of_type(facts: Facts, predicate: str, kinds: AbstractSet[str]) -> frozenset[str]:
    return frozenset(name for name, kind in facts.get(predicate, ()) if kind in kinds)


def _cleaners(domain: str) -> frozenset[str]:
    """Receptacle types that clean; one release of the domain leaves plain sinks out."""
    text = re.sub(r";[^\n]*", "", domain).lower()
    action = re.search(r"\(:action cleanobject\b(.*?):effect", text, re.DOTALL)
    if action is None:
        return _DEFAULT_CLEANERS
    return frozenset(re.findall(r"\(receptacletype \?r (\w+)\)", action[1]))


def _task_type(goal: str) -> str:
    """Name the ALFRED task type by what its goal asks for."""
    marks = {
        "istoggled": "look_at_obj_in_light",
        "isclean": "pick_clean_then_place_in_recep",
        "ishot": "pick_heat_then_place_in_recep",
        "iscool": "pick_cool_then_place_in_recep",
        "(=": "pick_two_obj_and_place",
    }
    return next((kind for mark, kind in marks.items() if mark in goal), "pick_and_place_simple")
