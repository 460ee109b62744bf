"""One visit to the shop: where the visitor is, and where an action leads.

Takes actions (`search[...]`, `click[...]`), gives pages. The rules are the official server's; it
knows neither goals nor rewards.
"""

import random
import re
from dataclasses import dataclass, field, replace
from enum import Enum

from step_ray.envs.webshop import pages
from step_ray.envs.webshop.catalogue import Catalogue
from step_ray.envs.webshop.pages import Kind, Page
from step_ray.envs.webshop.products import Product
from step_ray.envs.webshop.tables import MAX_HITS, PAGE_SIZE

_ACTION = re.compile(r"(.+)\[(.+)\]")
RANDOM = "<r>"
"""First word of a search for random products."""


class Place(Enum):
    """The kinds of pages."""

    START = "start"
    RESULTS = "results"
    ITEM = "item"
    SUB = "sub"
    DONE = "done"


def parse_action(action: str) -> tuple[str, str]:
    """(name, argument in lower case); an action of another form has no argument."""
    match = _ACTION.match(action)
    return (match[1], match[2].lower()) if match else (action, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where the visitor is."""

    place: Place = Place.START
    keywords: str = ""
    hits: tuple[int, ...] = ()
    """Rows of the catalogue that the search has found."""
    number: int = 1
    """Page of the results."""
    asin: str = ""
    chosen: tuple[tuple[str, str], ...] = ()
    """Option name and value, in the order in which they were chosen first."""
    sub: str = ""
    """Name of the sub-page."""
    seen: frozenset[str] = frozenset()
    """Products that were opened since the last start."""
    searches: int = 0

    @property
    def options(self) -> dict[str, str]:
        """The chosen value of each option."""
        return dict(self.chosen)


@dataclass(slots=True)
class Session:
    """A visit.

    Args:
        catalogue: the shop.
        instruction: shown on every page.
        show_attributes: item pages have the button `Attributes`.
        seed: of random searches.
    """

    catalogue: Catalogue
    instruction: str
    show_attributes: bool = False
    seed: str = ""
    state: State = field(default_factory=State)
    _page: Page | None = None

    def do(self, action: str) -> bool:
        """Carry out an action; False: it was not understood, nothing has changed."""
        name, argument = parse_action(action)
        after = None
        if self.state.place is Place.DONE:
            return False
        if name == "search" and argument:
            after = self._search(argument)
        elif name == "click":
            after = self._click(argument)
        if after is None:
            return False
        self.state, self._page = after, None
        return True

    def page(self) -> Page:
        """The page that is open; the end page belongs to who knows the reward."""
        if self._page is None:
            self._page = self._render()
        return self._page

    def product(self) -> Product:
        """The product of the open item page."""
        return self.catalogue.find(self.state.asin)

    def shown(self) -> list[Product]:
        """The products on the open results page."""
        rows = pages.shown_rows(self.state.hits, self.state.number)
        return [self.catalogue.product(row) for row in rows]

    def _render(self) -> Page:
        state, text = self.state, self.instruction
        if state.place is Place.RESULTS:
            hits = len(state.hits)
            return pages.results_page(text, state.number, hits, self.shown(), state.seen)
        if state.place is Place.ITEM:
            product = self.product()
            return pages.item_page(text, product, state.options, self.show_attributes)
        if state.place is Place.SUB:
            return pages.sub_page(text, self.product(), state.sub)
        return pages.start_page(text) if state.place is Place.START else ()

    def _search(self, argument: str) -> State:
        words = argument.split()
        if words[:1] == [RANDOM]:
            rng = random.Random(f"webshop search/{self.seed}/{self.state.searches}")
            number = len(self.catalogue)
            hits = tuple(rng.sample(range(number), min(MAX_HITS, number)))
        else:
            hits = self.catalogue.hits(argument.strip())
        return State(
            place=Place.RESULTS,
            keywords=argument.strip(),
            hits=hits,
            seen=self.state.seen,
            searches=self.state.searches + 1,
        )

    def _click(self, argument: str) -> State | None:
        """Where a click leads; None: there is nothing of that name here."""
        fitting = [
            part
            for part in self.page()
            if part.kind is not Kind.TEXT and part.text.lower() == argument
        ]
        # buttons win over products and options; of two options of one name the later one counts
        if not fitting or fitting[0].text == pages.SEARCH:
            return None
        part = next((p for p in fitting if p.kind is not Kind.OPTION), fitting[-1])
        if part.kind is Kind.PRODUCT:
            seen = self.state.seen | {part.text}
            return replace(self.state, place=Place.ITEM, asin=part.text, seen=seen)
        if part.kind is Kind.OPTION:
            chosen = {**self.state.options, part.group: part.text}
            return replace(self.state, chosen=tuple(chosen.items()))
        return self._press(part.text)

    def _press(self, button: str) -> State:
        state = self.state
        if button == pages.BACK:
            return State(searches=state.searches)
        if button == pages.BUY:
            return replace(state, place=Place.DONE)
        if button in pages.SUB_PAGES:
            return replace(state, place=Place.SUB, sub=button)
        if button == pages.NEXT:
            return replace(state, number=state.number + 1)
        if state.place is Place.RESULTS:
            return replace(state, number=state.number - 1)
        if state.place is Place.SUB:
            return replace(state, place=Place.ITEM, sub="")
        return replace(state, place=Place.RESULTS, asin="", chosen=())


def last_page(hits: int) -> int:
    """Number of the last page of results that shows a product."""
    return max(1, -(-hits // PAGE_SIZE))
