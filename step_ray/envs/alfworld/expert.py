"""An expert player of ALFWorld that knows only what the text has shown.

Takes a `Belief`, gives the next thought and action. It looks first where such things usually lie.
A small room, where any order soon ends, it searches as listed, which a model that knows no
household can learn from a few episodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from step_ray.envs.alfworld.belief import TOOL, Belief, class_of
from step_ray.envs.alfworld.usual import search_rank

SMALL_ROOM = 10
"""Receptacles up to which a room is searched as listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What the expert would do, and why."""

    thought: str
    action: str
    place: str | None = None
    """Receptacle where the action's purpose lies."""


def next_move(belief: Belief) -> Move:
    """The expert's next step.

    Never fails: where nothing is left to try it looks around.
    """
    if belief.holding is not None:
        return _with_object(belief, belief.holding)
    for name, receptacle in wanted_objects(belief):
        return _take(belief, name, receptacle)
    return _search(belief, belief.goal.target, f"I need to find a {belief.goal.target}.")


def wanted_objects(belief: Belief) -> Iterator[tuple[str, str]]:
    """Seen objects of the goal's class that are not yet where they belong, with their place."""
    goal = belief.goal
    home = belief.first(goal.destination) if goal.destination else None
    for receptacle in belief.receptacles:
        for name in belief.contents.get(receptacle, ()):
            if class_of(name) == goal.target and not (
                receptacle == home and (goal.treatment is None or name in belief.treated)
            ):
                yield name, receptacle


def approach(belief: Belief, place: str) -> str:
    """Go to a place; look at it from here where it turned out to stand right here."""
    return f"examine {place}" if place in belief.beside else f"go to {place}"


def _with_object(belief: Belief, held: str) -> Move:
    goal = belief.goal
    if class_of(held) != goal.target:
        return _put_away(belief, held)
    if goal.lamp:
        return _use_lamp(belief, held, goal.lamp)
    if goal.treatment and held not in belief.treated:
        return _treat(belief, held, goal.treatment)
    home = belief.first(goal.destination or "")
    if home is None:
        wanted = goal.destination or ""
        return _search(belief, wanted, f"I hold {held} and need a {wanted}.")
    return _put(belief, held, home, f"I hold the {goal.adjective}{held}, it goes to {home}.")


def _put_away(belief: Belief, held: str) -> Move:
    """Get rid of a wrong object: where it came from, else here, else wherever it can be put."""
    places = [belief.origin, belief.location, *belief.receptacles]
    free = (p for p in places if p is not None and (held, p) not in belief.refused)
    place = next(free, belief.receptacles[0])
    return _put(belief, held, place, f"I do not need {held}, I put it away.")


def _put(belief: Belief, held: str, place: str, thought: str) -> Move:
    if belief.location != place:
        return Move(thought=thought, action=approach(belief, place), place=place)
    if place in belief.closed:
        return Move(thought=thought, action=f"open {place}", place=place)
    return Move(thought=thought, action=f"move {held} to {place}", place=place)


def _take(belief: Belief, name: str, receptacle: str) -> Move:
    thought = f"I take {name} from {receptacle}."
    if belief.location != receptacle:
        return Move(thought=thought, action=approach(belief, receptacle), place=receptacle)
    if receptacle in belief.closed:
        return Move(thought=thought, action=f"open {receptacle}", place=receptacle)
    return Move(thought=thought, action=f"take {name} from {receptacle}", place=receptacle)


def _treat(belief: Belief, held: str, treatment: str) -> Move:
    tool = belief.first(TOOL[treatment])
    if tool is None:
        return _search(belief, TOOL[treatment], f"I need a {TOOL[treatment]}.")
    thought = f"I hold {held}, I {treatment} it with {tool}."
    if belief.location != tool:
        return Move(thought=thought, action=approach(belief, tool), place=tool)
    return Move(thought=thought, action=f"{treatment} {held} with {tool}", place=tool)


def _use_lamp(belief: Belief, held: str, lamp: str) -> Move:
    seen = belief.where_is(lamp)
    if seen is None:
        return _search(belief, lamp, f"I hold {held}, I need to find a {lamp}.")
    name, receptacle = seen
    thought = f"I hold {held}, I use {name} at {receptacle}."
    action = f"use {name}" if belief.location == receptacle else approach(belief, receptacle)
    return Move(thought=thought, action=action, place=receptacle)


def _search(belief: Belief, wanted: str, thought: str) -> Move:
    here = belief.location
    if here is not None and here in belief.closed and here not in belief.contents:
        return Move(thought=thought, action=f"open {here}", place=here)
    unseen = belief.unseen()
    if not unseen:
        return Move(thought=thought, action="look")
    if len(belief.receptacles) > SMALL_ROOM:
        unseen = sorted(unseen, key=lambda place: search_rank(wanted, class_of(place)))
    return Move(thought=thought, action=approach(belief, unseen[0]), place=unseen[0])
