"""The native ALFWorld engine: plays one game of the ALFRED text domain.

Takes a `Game` and commands; gives the official engine's texts, its list of admissible commands and
whether the goal holds. One object is one episode's state: one thread at a time, any number side by
side. Reads no files and imports neither textworld nor alfworld.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from step_ray.envs.alfworld import text
from step_ray.envs.alfworld.problem import CHANGING, Game, load_game

__all__ = ["Game", "NativeEngine", "StepOutcome", "load_game"]

Action: TypeAlias = tuple[str, ...]
"""Verb and the entities it is carried out on."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Answer to one command; `text` is `NOTHING_HAPPENS` where it was not admissible."""

    text: str
    won: bool
    done: bool


class NativeEngine:
    """An episode of one game; call `reset` first.

    Args:
        game: from `load_game`; never changed, so engines may share it.
    """

    def __init__(self, game: Game) -> None:
        self.game = game
        self._facts: dict[str, set[tuple[str, ...]]] = {}
        self._static = {name: rows for name, rows in game.facts.items() if name not in CHANGING}
        self._place = ""
        self._held: str | None = None
        self._actions: dict[str, Action] | None = None

    def reset(self) -> str:
        """Start over and return the first observation: welcome, surroundings, goal."""
        self._facts = {name: set(self.game.facts.get(name, ())) for name in CHANGING}
        self._state = {**self._static, **self._facts}
        ((_, self._place),) = self._facts["atlocation"]
        self._held, self._actions = None, None
        # Before any command nothing ties 'you see' to a place, so the whole room is listed.
        around = self._look() if self._here() else self._middle(self.game.places)
        return f"{text.WELCOME}\n\n{around}\n\n{self.game.goal}"

    def step(self, command: str) -> StepOutcome:
        """Carry out one command, given exactly as `admissible` spells it."""
        action = self._admissible_actions().get(command.strip())
        if action is None:
            answer = text.NOTHING_HAPPENS
        else:
            verb, *entities = action
            answer = self._HANDLERS[verb](self, *entities)
            self._actions = None
        won = self.game.goal_formula.holds(self._state, {})
        return StepOutcome(answer, won, won)

    def admissible(self) -> list[str]:
        """Commands that would do something now, in alphabetical order."""
        return sorted(self._admissible_actions())

    # What can be done ---------------------------------------------------------------------------

    def _admissible_actions(self) -> dict[str, Action]:
        if self._actions is None:
            places, here = self.game.places, self._place
            actions: dict[str, Action] = {
                command: ("go", receptacle)
                for command, receptacle in self.game.travel
                if places[receptacle] != here
            }
            for command, *action in self._local_actions():
                actions.setdefault(command, tuple(action))
            self._actions = actions
        return self._actions

    def _local_actions(self) -> Iterator[tuple[str, ...]]:
        yield "look", "look"
        yield "inventory", "inventory"
        if self.game.wording.help is not None:
            yield "help", "help"
        for receptacle in self._here():
            yield from self._actions_at(receptacle)
        if self._held is not None:
            yield from self._actions_with(self._held)

    def _actions_at(self, r: str) -> Iterator[tuple[str, ...]]:
        name, names = self.game.names[r], self.game.names
        yield f"examine {name}", "examine receptacle", r
        if self._is("openable", r):
            verb = "close" if self._is("opened", r) else "open"
            yield f"{verb} {name}", verb, r
        free = not self._facts["holdsany"] and self._is_accessible(r)
        for o in self._inside(r):
            if self._is("toggleable", o):  # even inside a closed receptacle
                yield f"use {names[o]}", "use", o
            if free and self._is("pickupable", o):
                yield f"take {names[o]} from {name}", "take", o, r

    def _actions_with(self, o: str) -> Iterator[tuple[str, ...]]:
        game, name = self.game, self.game.names[o]
        yield f"examine {name}", "examine object", o
        for r in self._here():
            if o in game.accepts.get(r, ()) and self._is_accessible(r):
                yield game.wording.put_command.format(o=name, r=game.names[r]), "put", o, r
            if r in game.washers and self._is("cleanable", o):
                yield f"clean {name} with {game.names[r]}", "clean", o, r
            if r in game.heaters and self._is("heatable", o):
                yield f"heat {name} with {game.names[r]}", "heat", o, r
            if r in game.coolers and self._is("coolable", o):
                yield f"cool {name} with {game.names[r]}", "cool", o, r
        if o in game.knives:
            for other in self._objects_at_place():
                if self._is("sliceable", other):
                    yield f"slice {game.names[other]} with {name}", "slice", other, o

    # What is the case ---------------------------------------------------------------------------

    def _is(self, predicate: str, entity: str) -> bool:
        return (entity,) in self._state.get(predicate, ())

    def _is_accessible(self, r: str) -> bool:
        return not self._is("openable", r) or self._is("opened", r)

    def _here(self) -> tuple[str, ...]:
        return self.game.receptacles_at.get(self._place, ())

    def _inside(self, r: str) -> list[str]:
        return sorted([o for o, where in self._facts["inreceptacle"] if where == r])

    def _objects_at_place(self) -> list[str]:
        here = self._place
        return sorted([o for o, where in self._facts["objectatlocation"] if where == here])

    def _indefinite(self, *entities: str) -> str:
        return text.join_list(f"a {self.game.names[entity]}" for entity in entities)

    # What commands do ---------------------------------------------------------------------------

    def _go(self, r: str) -> str:
        place = self.game.places[r]
        self._facts["atlocation"].clear()
        self._facts["atlocation"].add((self.game.agent, place))
        self._place = place
        names = self.game.names
        return self.game.wording.arrive.format(r=names[r], l=names[place]) + self._describe(r)

    def _open(self, r: str) -> str:
        self._facts["opened"].add((r,))
        return text.OPEN.format(r=self.game.names[r]) + self._describe(r)

    def _close(self, r: str) -> str:
        self._facts["opened"].discard((r,))
        return text.CLOSE.format(r=self.game.names[r])

    def _take(self, o: str, r: str) -> str:
        facts, agent = self._facts, self.game.agent
        facts["inreceptacle"].discard((o, r))
        facts["not_inreceptacle"].add((o, r))
        facts["objectatlocation"].discard((o, self._place))
        facts["holds"].add((agent, o))
        facts["holdsany"].add((agent,))
        self._held = o
        return self._say(text.TAKE, o, r)

    def _put(self, o: str, r: str) -> str:
        facts, agent = self._facts, self.game.agent
        facts["inreceptacle"].add((o, r))
        facts["not_inreceptacle"].discard((o, r))
        facts["objectatlocation"].add((o, self._place))
        facts["holds"].discard((agent, o))
        facts["holdsany"].discard((agent,))
        self._held = None
        return self._say(self.game.wording.put, o, r)

    def _use(self, o: str) -> str:
        # There is no 'off' in this domain: a used object counts as toggled for good.
        self._facts["ison"] ^= {(o,)}
        self._facts["istoggled"].add((o,))
        return text.USE.format(o=self.game.names[o])

    def _clean(self, o: str, r: str) -> str:
        self._facts["isclean"].add((o,))
        return self._say(text.CLEAN, o, r)

    def _heat(self, o: str, r: str) -> str:
        self._facts["ishot"].add((o,))
        self._facts["iscool"].discard((o,))
        return self._say(text.HEAT, o, r)

    def _cool(self, o: str, r: str) -> str:
        self._facts["iscool"].add((o,))
        self._facts["ishot"].discard((o,))
        return self._say(text.COOL, o, r)

    def _slice(self, o: str, knife: str) -> str:
        self._facts["issliced"].add((o,))
        return text.SLICE.format(o=self.game.names[o], k=self.game.names[knife])

    def _say(self, template: str, o: str, r: str) -> str:
        return template.format(o=self.game.names[o], r=self.game.names[r])

    # What is seen -------------------------------------------------------------------------------

    def _look(self) -> str:
        here = self._here()
        if not here:
            return self._middle(())  # the official engine lists only what stands at this very place
        facing = text.join_list(self.game.names[r] for r in here)
        taken = self._facts["not_inreceptacle"]
        beside = [o for o in self._objects_at_place() for r in here if (o, r) in taken]
        return f"{text.FACING}{facing}{text.NEXT_TO_IT}{self._indefinite(*beside)}."

    def _middle(self, receptacles: Iterable[str]) -> str:
        return f"{text.IN_THE_MIDDLE}{self._indefinite(*receptacles)}."

    def _inventory(self) -> str:
        if self._held is None:
            return text.EMPTY_HANDS
        return f"{text.CARRYING}{self._indefinite(self._held)}."

    def _help(self) -> str:
        return self.game.wording.help or text.NOTHING_HAPPENS

    def _describe(self, r: str) -> str:
        name = self.game.names[r]
        if not self._is("openable", r):
            start = text.ON_RECEPTACLE.format(r=name)
        elif self._is("opened", r):
            start = text.OPEN_RECEPTACLE.format(r=name)
        else:
            return text.CLOSED_RECEPTACLE.format(r=name)
        return f"{start}{self._indefinite(*self._inside(r))}."

    def _describe_object(self, o: str) -> str:
        name = self.game.names[o]
        if self._is("isreceptacleobject", o):
            rows = self._state.get("inreceptacleobject", ())
            inner = sorted(inside for inside, outside in rows if outside == o)
            return f"{text.RECEPTACLE_OBJECT.format(o=name)}{self._indefinite(*inner)}."
        return next(
            template.format(o=name)
            for marks, template in text.OBJECT_TEXTS
            if all(self._is(mark, o) for mark in marks)
        )

    _HANDLERS: ClassVar[dict[str, Callable[..., str]]] = {
        "look": _look,
        "inventory": _inventory,
        "help": _help,
        "examine receptacle": _describe,
        "examine object": _describe_object,
        "go": _go,
        "open": _open,
        "close": _close,
        "take": _take,
        "put": _put,
        "use": _use,
        "clean": _clean,
        "heat": _heat,
        "cool": _cool,
        "slice": _slice,
    }
