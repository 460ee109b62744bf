"""WebShop's expert: searches from the instruction, opens the product, chooses options, buys.

Takes a task, whose params say which product and options are meant, and a visit; gives moves with
thoughts in the words of the instruction and the pages. Judging is judge.py's business.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from step_ray.envs.webshop.env import open_session
from step_ray.envs.webshop.goals import load_task
from step_ray.envs.webshop.products import Product
from step_ray.envs.webshop.reward import Goal, count_option_hits
from step_ray.envs.webshop.session import Place, Session, parse_action
from step_ray.envs.webshop.tables import PAGE_SIZE
from step_ray.types import Task

PATIENCE = 3
"""Pages of results that the expert looks through before it searches again."""
_LIMIT = re.compile(r",? and price lower than [\d.]+ dollars$")
_FILLER_TEXT = """
a also am an and are be but buy can find for get give i i'd i'm i've in is it like looking me my
need of on or please show some something that the them to want will with would
"""
_FILLER = frozenset(_FILLER_TEXT.split())
_EDGES = " ,.:;!?()\"'"
_TITLE_WORDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What the expert would do, and why."""

    thought: str
    action: str


@dataclass(slots=True)
class Visit:
    """A visit so far, and the searches that were made in it."""

    session: Session
    tried: list[str] = field(default_factory=list)

    def do(self, action: str) -> bool:
        """Carry out an action; False: it was not understood."""
        name, argument = parse_action(action)
        understood = self.session.do(action)
        if understood and name == "search":
            self.tried.append(argument.strip())
        return understood

    def copied(self) -> "Visit":
        """A visit that goes its own way from here."""
        return Visit(copy.copy(self.session), list(self.tried))


class Shopper:
    """The expert of one task.

    Raises:
        EnvError: the task is no WebShop goal.
        DataError: its product is not in the catalogue.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        catalogue = open_session(task).catalogue
        self.goal: Goal = load_task(task).goal(catalogue)
        self.product: Product = self.goal.product
        row = catalogue.row(self.product.asin)
        assert row is not None
        self._row = row
        self.choices = reachable_choices(self.goal)
        """Option name -> value that is to be chosen."""
        self.queries = search_queries(task.goal, self.goal)
        """Searches, in the order in which they are tried."""

    def replay(self, history: Sequence[tuple[str, str]]) -> Visit:
        """The visit after an episode's (action, observation) pairs.

        It has the button for attributes, which no other setting contradicts.
        """
        visit = Visit(open_session(self._task, show_attributes=True))
        for action, _ in history:
            visit.do(action)
        return visit

    def target_page(self, session: Session) -> int | None:
        """The page of the search's results that shows the product."""
        hits = session.state.hits
        return hits.index(self._row) // PAGE_SIZE + 1 if self._row in hits else None

    def near(self, session: Session) -> bool:
        """The product is on one of the first pages of the results."""
        page = self.target_page(session)
        return page is not None and page <= PATIENCE

    def pending(self, session: Session) -> dict[str, str]:
        """Options that are still to be chosen."""
        chosen = session.state.options
        return {name: v for name, v in self.choices.items() if chosen.get(name) != v}

    def here(self, session: Session) -> bool:
        """The product, or one of its sub-pages, is open."""
        state = session.state
        return state.place in (Place.ITEM, Place.SUB) and state.asin == self.product.asin

    def next_move(self, visit: Visit) -> Move:
        """The next step from where the visit stands; never fails."""
        session, state = visit.session, visit.session.state
        if state.place is Place.SUB:
            return Move(thought="I go back to the product.", action="click[< prev]")
        if self.here(session):
            return self._finish(session)
        if state.place is Place.ITEM and self._findable(visit):
            thought = f"{state.asin} is not what I want. I go back to the results."
            return Move(thought=thought, action="click[< prev]")
        if state.place is Place.RESULTS and self._findable(visit):
            return self._towards(session)
        return self._search(visit)

    def _findable(self, visit: Visit) -> bool:
        last_resort = self.target_page(visit.session) is not None and not self._untried(visit)
        return self.near(visit.session) or last_resort

    def _towards(self, session: Session) -> Move:
        page, number = self.target_page(session), session.state.number
        if page == number:
            asin = self.product.asin
            title = " ".join(self.product.title.split()[:_TITLE_WORDS])
            return Move(thought=f"{asin} fits: {title}.", action=f"click[{asin.lower()}]")
        assert page is not None
        button, word = ("next >", "next") if page > number else ("< prev", "previous")
        thought = f"Nothing on this page is what I want. I look at the {word} one."
        return Move(thought=thought, action=f"click[{button}]")

    def _finish(self, session: Session) -> Move:
        for name, value in self.pending(session).items():
            return Move(thought=f"I need the {name} {value}.", action=f"click[{value}]")
        chosen = "Everything is chosen" if self.choices else "It is what I want"
        return Move(thought=f"{chosen}. I buy it.", action="click[buy now]")

    def _untried(self, visit: Visit) -> list[str]:
        return [query for query in self.queries if query not in visit.tried]

    def _search(self, visit: Visit) -> Move:
        query = next(iter(self._untried(visit)), self.queries[-1])
        if visit.tried:
            thought = "The results do not show what I want. I search with other words."
        else:
            thought = f"I want this: {wish(self._task.goal)}. I search for it."
        return Move(thought=thought, action=f"search[{query}]")


def wish(instruction: str) -> str:
    """The instruction without its price limit and its opening."""
    text = _LIMIT.sub("", instruction).strip().rstrip(".")
    return re.sub(r"^find me ", "", text, flags=re.I)


def search_queries(instruction: str, goal: Goal) -> tuple[str, ...]:
    """Searches: the words of the instruction, those without options, and the product's title."""
    without = (*goal.attributes, goal.product.query)
    texts = (wish(instruction), " ".join(without), goal.product.title)
    queries = [_keywords(text) for text in texts]
    queries[-1] = " ".join(queries[-1].split()[: 2 * _TITLE_WORDS])
    fallback = goal.product.asin.lower()
    return tuple(dict.fromkeys(query for query in queries if query)) or (fallback,)


def _keywords(text: str) -> str:
    """The telling words of a text, each once, without brackets, which end an action."""
    words = (word.strip(_EDGES) for word in re.sub(r"[\[\]<>]", " ", text.lower()).split())
    return " ".join(dict.fromkeys(word for word in words if word and word not in _FILLER))


def reachable_choices(goal: Goal) -> dict[str, str]:
    """Option name -> value that the goal wants and a click can choose.

    A goal of values alone takes, for each, the value that equals it or else counts as it.
    """
    groups = dict(goal.product.options)
    choices: dict[str, str] = {}
    for name, value in goal.options:
        if name:
            choices[name] = value
            continue
        found = _best_value(groups, value)
        if found is not None:
            choices.setdefault(*found)
    return {name: value for name, value in choices.items() if _can_click(groups, name, value)}


def _best_value(groups: dict[str, tuple[str, ...]], wanted: str) -> tuple[str, str] | None:
    every = [(name, value) for name, values in groups.items() for value in values]
    equal = next((pair for pair in every if pair[1] == wanted.lower()), None)
    like = (pair for pair in every if count_option_hits([pair[1]], [("", wanted)]))
    return equal or next(like, None)


def _can_click(groups: dict[str, tuple[str, ...]], name: str, value: str) -> bool:
    """A click on the value chooses it for this option: no later option has the same value."""
    names = list(groups)
    if name not in groups or parse_action(f"click[{value}]") != ("click", value):
        return False
    later = names[names.index(name) + 1 :]
    return value in groups[name] and not any(value in groups[other] for other in later)
