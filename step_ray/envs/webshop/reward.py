"""The reward of a purchase, by the official rules.

Takes the bought product with the chosen options and a goal, gives the hits and the reward. Only the
noun tagger of the title similarity differs, see `nouns`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz import fuzz, utils

from step_ray.envs.webshop.products import Product
from step_ray.envs.webshop.tables import COLOURS

_SIMILAR = 85
"""Token-set ratio, percent; above it two texts count as the same."""
_NAME = re.compile(r"[^\W_]+")
_LETTER = re.compile(r"[^\W\d_]")
_NO_NOUNS_TEXT = """
a about above after all also although am among an and another any are around as at be because
been before below between both but by can could did do does doing down during each either etc
ever every few for from further had has have having he her here hers him his how however i if in
into is it its itself just may me might more most much must my neither no nor not of off on once
only or other our out over own per quite s same shall she should so some such t than that the
their them then there these they this those through to too under until up upon us very via was
we were what when where whether which while who whom whose why will with within without would
yet you your
"""
_NO_NOUNS = frozenset(_NO_NOUNS_TEXT.split())
"""Words of closed classes; any other word with a letter may be a noun in a product's title."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is to be bought."""

    product: Product
    """The product that the instruction was written for."""
    attributes: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    """Name and value; the name is empty where the instruction gives only values."""
    price_upper: float
    """Dollars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A purchase, judged."""

    attribute_hits: int
    option_hits: int
    price_ok: bool
    query_match: bool
    category_match: bool
    type_factor: float
    """r_type: 1 for a product of the kind that was wanted, down to 0."""
    reward: float
    """0 to 1."""


def score(bought: Product, options: Sequence[str], price: float, goal: Goal) -> Score:
    """Judge a purchase.

    Args:
        bought: the product.
        options: the chosen values.
        price: of the product, dollars.
        goal: what was wanted.
    """
    attribute_hits = count_attribute_hits(bought, goal.attributes)
    option_hits = count_option_hits(options, goal.options)
    price_ok = price <= goal.price_upper
    query_match = bought.query == goal.product.query
    category_match = same_category(bought, goal.product)
    factor = type_factor(
        query_match or category_match, title_similarity(bought.title, goal.product.title)
    )
    hits = attribute_hits + option_hits + price_ok
    return Score(
        attribute_hits=attribute_hits,
        option_hits=option_hits,
        price_ok=price_ok,
        query_match=query_match,
        category_match=category_match,
        type_factor=factor,
        reward=factor * hits / (len(goal.attributes) + len(goal.options) + 1),
    )


def type_factor(matches: bool, similarity: float) -> float:
    """r_type from the match of query or category and the similarity of the titles."""
    if similarity == 0:
        return 0.0
    if similarity < 0.1:
        return 0.1
    return 1.0 if matches or similarity > 0.2 else 0.5


def similar(left: str, right: str) -> bool:
    """The official fuzzy match: token-set ratio of letters and digits, rounded, above 85."""
    return round(fuzz.token_set_ratio(left, right, processor=utils.default_process)) > _SIMILAR


def count_attribute_hits(product: Product, wanted: Sequence[str]) -> int:
    """How many of the wanted attributes the product has or names in its texts."""
    texts = (product.title, " ".join(product.bullets), product.description)
    lowered = [text.lower() for text in texts]
    return sum(
        any(similar(own, attribute) for own in product.attributes)
        or any(attribute in text for text in lowered)
        for attribute in wanted
    )


def count_option_hits(chosen: Sequence[str], wanted: Sequence[tuple[str, str]]) -> int:
    """How many of the wanted options some chosen value matches."""
    values = [_colour_in(value) for value in chosen]
    return sum(
        any(similar(value, _wanted(name, option)) for value in values) for name, option in wanted
    )


def _wanted(name: str, value: str) -> str:
    """What a chosen value is compared with.

    Pairs of name and value (synthetic goals) become a colour only if one of the two is one; values
    alone (human goals) also if one is contained in them.
    """
    if not name:
        return _colour_in(value)
    exact = next((colour for colour in COLOURS if colour in (name, value)), None)
    # the official server compares what Python prints for the pair: a no-break space is `xa0` there
    return exact or repr((name, value))


def _colour_in(text: str) -> str:
    """The first colour word that is contained in a text, else the text."""
    return next((colour for colour in COLOURS if colour in text), text)


def same_category(left: Product, right: Product) -> bool:
    """The paths of two products share at least two names."""
    return len(_path(left) & _path(right)) >= 2


def _path(product: Product) -> set[str]:
    return {name.strip() for name in product.product_category.split("\u203a")}


@lru_cache(maxsize=10_000)
def nouns(title: str) -> tuple[str, ...]:
    """The words of a title that count as nouns, lower case, with repeats.

    A substitute for the official tagger (spaCy's small English model): every word with a letter
    that belongs to no closed class. Titles are mostly nouns and names, so it finds a little more
    overlap; jobs/check_webshop.py measures how much that matters.
    """
    words = _NAME.findall(title.lower())
    return tuple(w for w in words if _LETTER.search(w) and w not in _NO_NOUNS)


def title_similarity(bought: str, wanted: str) -> float:
    """Share of the wanted title's nouns that the bought one has; 0.2 if there is none."""
    names = nouns(wanted)
    return len(set(nouns(bought)) & set(names)) / len(names) if names else 0.2
