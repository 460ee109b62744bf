"""Where objects usually lie, counted over training games: what `usual.py`'s table is made from.

Takes games, gives the lines of the table. A receptacle class is worth the share of its receptacles
that hold such an object at the start (in games with one), by the actions that a look costs: 2 where
the class is openable, else 1.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from step_ray.envs.alfworld.belief import class_of
from step_ray.envs.alfworld.problem import Game
from step_ray.envs.alfworld.tables import FIXED_OBJECTS, HOLDS, OPENABLE_RATE

MIN_COUNT, MIN_WORTH = 3, 0.004


def count(games: Iterable[Game]) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """(object class, receptacle class) -> receptacles that hold one, and all of them."""
    holding: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for game in games:
        places = defaultdict(set)
        for *_, thing, receptacle in game.facts["inreceptacle"]:
            places[class_of(game.names[thing])].add(receptacle)
        for kind, full in places.items():
            total.update((kind, class_of(game.names[r])) for r in game.places)
            holding.update((kind, class_of(game.names[r])) for r in full if r in game.places)
    return holding, total


def usual_table(games: Iterable[Game]) -> Iterator[str]:
    """One line an object class: its receptacle classes, the most worth first."""
    holding, total = count(games)
    openable = {name.lower() for name in OPENABLE_RATE}
    things = {o.lower() for kinds in HOLDS.values() for o in kinds} | {
        o.lower() for o in FIXED_OBJECTS
    }
    for kind in sorted(things):
        worth = {
            place: holding[kind, place] / total[kind, place] / (1 + (place in openable))
            for place in sorted(name.lower() for name in HOLDS)
            if holding[kind, place] >= MIN_COUNT
        }
        best = sorted((p for p in worth if worth[p] > MIN_WORTH), key=lambda p: -worth[p])
        yield f'"{kind}": "{" ".join(best)}",'
