"""PDDL goals: parse a `(:goal ...)` once, then ask whether it holds in a state.

A state is a dict from predicate to the set of argument tuples that hold. Quantified variables get
their candidates when the goal is built (by type and by unchanging one-variable facts), so that a
check inside an episode costs microseconds. Never changes a state.
"""

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from step_ray.errors import DataError

Facts: TypeAlias = Mapping[str, AbstractSet[tuple[str, ...]]]
Binding: TypeAlias = dict[str, str]
Tree: TypeAlias = "str | list[Tree]"


class Formula(Protocol):
    """A condition that is true or false in a state, given values of its free variables."""

    @property
    def variables(self) -> frozenset[str]:
        """Free variables."""
        ...

    def holds(self, facts: Facts, binding: Binding) -> bool:
        """Whether the condition is true."""
        ...


@dataclass(frozen=True, slots=True)
class Atom:
    """`(predicate term ...)`; terms that start with '?' are variables."""

    predicate: str
    terms: tuple[str, ...]
    variables: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "variables", frozenset(t for t in self.terms if t[0] == "?"))

    def holds(self, facts: Facts, binding: Binding) -> bool:
        """Whether the atom, or the equality, is true."""
        terms = tuple([binding.get(term, term) for term in self.terms])
        if self.predicate == "=":
            return terms[0] == terms[1]
        return terms in facts.get(self.predicate, frozenset())


@dataclass(frozen=True, slots=True)
class Not:
    """Negation."""

    part: Formula
    variables: frozenset[str]

    def holds(self, facts: Facts, binding: Binding) -> bool:
        """Whether the part is false."""
        return not self.part.holds(facts, binding)


@dataclass(frozen=True, slots=True)
class Or:
    """Disjunction."""

    parts: tuple[Formula, ...]
    variables: frozenset[str]

    def holds(self, facts: Facts, binding: Binding) -> bool:
        """Whether some part is true."""
        return any(part.holds(facts, binding) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Exists:
    """Conjunction with its own variables, tried one after another; no variables: plain `and`."""

    stages: tuple[tuple[str, tuple[str, ...], tuple[Formula, ...]], ...]
    """Per variable: name, candidates, the parts that can be decided once it has a value."""
    ground: tuple[Formula, ...]
    """Parts that can be decided before any variable has a value."""
    variables: frozenset[str]

    def holds(self, facts: Facts, binding: Binding) -> bool:
        """Whether some choice of values makes every part true."""
        if not all(part.holds(facts, binding) for part in self.ground):
            return False
        return self._search(0, facts, dict(binding))

    def _search(self, depth: int, facts: Facts, binding: Binding) -> bool:
        if depth == len(self.stages):
            return True
        name, candidates, parts = self.stages[depth]
        for value in candidates:
            binding[name] = value
            if not all(part.holds(facts, binding) for part in parts):
                continue
            if self._search(depth + 1, facts, binding):
                return True
        return False


def parse_goal(text: str) -> Tree:
    """Parse '(:goal CONDITION) ...' into nested lists; what follows it is ignored."""
    stack: list[list[Tree]] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        else:
            done = stack.pop()
            if len(stack) == 1 and len(done) == 2:
                return done[1]
            if len(stack) <= 1:
                break
            stack[-1].append(done)
    raise DataError("pddl_problem: (:goal ...) is not one closed condition")


def typed_names(tokens: Sequence[str]) -> dict[str, str]:
    """Read the PDDL list `a b - type c - type2` as {name: type}; no type means object."""
    types: dict[str, str] = {}
    waiting: list[str] = []
    rest = iter(tokens)
    for token in rest:
        if token == "-":
            kind = next(rest, "object")
            types.update(dict.fromkeys(waiting, kind))
            waiting = []
        else:
            waiting.append(token)
    return types | dict.fromkeys(waiting, "object")


class GoalBuilder:
    """Builds formulas for one game.

    Args:
        types: type of every object of the game.
        facts: facts of the initial state.
        changing: predicates that actions can change and an engine keeps up to date.
        unsupported: predicates that actions can change but an engine does not track.
    """

    def __init__(
        self,
        types: Mapping[str, str],
        facts: Facts,
        changing: AbstractSet[str],
        unsupported: AbstractSet[str],
    ) -> None:
        self._types, self._facts = types, facts
        self._changing, self._unsupported = changing, unsupported
        self._count = 0

    def build(self, tree: Tree) -> Formula:
        """Turn the parsed goal into a formula.

        Raises:
            DataError: the goal uses a predicate or a construct that cannot be checked.
        """
        return self._build(tree, {})

    def _build(self, tree: Tree, scope: Binding) -> Formula:
        if not isinstance(tree, list) or not tree or not isinstance(tree[0], str):
            raise DataError(f"pddl_problem: goal part {tree!r} is not a condition")
        head, rest = tree[0], tree[1:]
        if head in ("and", "exists"):
            return self._conjunction(tree, scope)
        if head == "not":
            return self._negated(rest[0], scope)
        if head == "forall":
            return self._negated(["exists", rest[0], ["not", rest[1]]], scope)
        if head in ("or", "imply"):
            parts = [["not", rest[0]], *rest[1:]] if head == "imply" else rest
            built = tuple(self._build(part, scope) for part in parts)
            return Or(built, _free(built))
        return self._atom(head, rest, scope)

    def _atom(self, head: str, terms: Sequence[Tree], scope: Binding) -> Atom:
        if head in self._unsupported or not all(isinstance(term, str) for term in terms):
            raise DataError(f"pddl_problem: goal condition {head!r} cannot be checked")
        return Atom(head, tuple(scope.get(str(term), str(term)) for term in terms))

    def _negated(self, tree: Tree, scope: Binding) -> Formula:
        part = self._build(tree, scope)
        return Not(part, part.variables)

    def _conjunction(self, tree: Tree, scope: Binding) -> Formula:
        domains: dict[str, list[str]] = {}
        parts: list[Formula] = []
        self._flatten(tree, scope, domains, parts)
        for part in parts:
            self._narrow(part, domains)
        return _schedule(domains, parts)

    def _flatten(
        self, tree: Tree, scope: Binding, domains: dict[str, list[str]], parts: list[Formula]
    ) -> None:
        """Collect nested `and` / `exists` into one list; variables get unique names."""
        if isinstance(tree, list) and tree and tree[0] == "and":
            for part in tree[1:]:
                self._flatten(part, scope, domains, parts)
        elif isinstance(tree, list) and tree and tree[0] == "exists":
            inner = dict(scope)
            for name, kind in typed_names([str(token) for token in tree[1]]).items():
                self._count += 1
                inner[name] = f"{name}#{self._count}"
                domains[inner[name]] = self._candidates(kind)
            self._flatten(tree[2], inner, domains, parts)
        else:
            parts.append(self._build(tree, scope))

    def _candidates(self, kind: str) -> list[str]:
        # 'object' is also the root of PDDL's types: it ranges over everything.
        return [name for name, its in self._types.items() if kind in (its, "object")]

    def _narrow(self, part: Formula, domains: dict[str, list[str]]) -> None:
        if len(part.variables) != 1 or not isinstance(part, Atom):
            return
        (name,) = part.variables
        if name in domains and part.predicate not in self._changing:
            domains[name] = [c for c in domains[name] if part.holds(self._facts, {name: c})]


def _free(parts: Sequence[Formula]) -> frozenset[str]:
    return frozenset().union(*(part.variables for part in parts))


def _schedule(domains: dict[str, list[str]], parts: Sequence[Formula]) -> Exists:
    """Order the variables, fewest candidates first, and decide each part as early as possible."""
    waiting = list(parts)

    def take(unknown: AbstractSet[str]) -> tuple[Formula, ...]:
        ready = tuple(part for part in waiting if not part.variables & unknown)
        waiting[:] = [part for part in waiting if part.variables & unknown]
        return ready

    unknown = set(domains)
    ground = take(unknown)
    stages = []
    for name in sorted(domains, key=lambda name: len(domains[name])):
        unknown.discard(name)
        stages.append((name, tuple(domains[name]), take(unknown)))
    return Exists(tuple(stages), ground, _free(parts) - frozenset(domains))
