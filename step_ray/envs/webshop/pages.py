"""What the pages say: parts with their kind, as `text` or `text_rich` observations.

Takes a page's content, gives parts, texts and the list of what can be clicked. It moves nowhere
(session.py does).
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum

from step_ray.envs.webshop.products import Product
from step_ray.envs.webshop.tables import PAGE_SIZE

SEPARATOR = " [SEP] "
SEARCH, BACK, NEXT, PREVIOUS, BUY = "Search", "Back to Search", "Next >", "< Prev", "Buy Now"
DESCRIPTION, FEATURES, REVIEWS, ATTRIBUTES = "Description", "Features", "Reviews", "Attributes"
SUB_PAGES = (DESCRIPTION, FEATURES, REVIEWS, ATTRIBUTES)


class Kind(Enum):
    """What a part of a page is."""

    TEXT = "text"
    BUTTON = "button"
    PRODUCT = "product"
    """A product's id, a link to its page."""
    OPTION = "option"
    """A value that can be chosen."""


@dataclass(frozen=True, slots=True)
class Part:
    """One visible string."""

    text: str
    kind: Kind = Kind.TEXT
    marked: bool = False
    """Chosen (options) or seen before (products)."""
    group: str = ""
    """Name of an option's group."""


Page = tuple[Part, ...]


def _buttons(*texts: str) -> list[Part]:
    return [Part(text, Kind.BUTTON) for text in texts]


def _head(instruction: str) -> list[Part]:
    return [Part("Instruction:"), Part(instruction)]


def start_page(instruction: str) -> Page:
    """The search bar."""
    return (Part("WebShop"), *_head(instruction), *_buttons(SEARCH))


def results_page(
    instruction: str, number: int, hits: int, products: Iterable[Product], seen: Set[str]
) -> Page:
    """Page `number` (from 1) of a search with `hits` results."""
    parts = [*_head(instruction), *_buttons(BACK), Part(f"Page {number} (Total results: {hits})")]
    parts += _buttons(PREVIOUS, NEXT) if number > 1 else _buttons(NEXT)
    for product in products:
        parts.append(Part(product.asin, Kind.PRODUCT, product.asin in seen))
        parts += [Part(product.title), Part(product.price_tag)]
    return tuple(parts)


def item_page(
    instruction: str, product: Product, chosen: Mapping[str, str], show_attributes: bool
) -> Page:
    """A product with its options."""
    parts, picked = [*_head(instruction), *_buttons(BACK, PREVIOUS)], set(chosen.values())
    for name, values in product.options:
        parts.append(Part(name))
        parts += [Part(value, Kind.OPTION, value in picked, name) for value in values]
    parts += [Part(product.title), Part(f"Price: {product.price_tag}"), Part("Rating: N.A.")]
    subs = SUB_PAGES if show_attributes else SUB_PAGES[:-1]
    return (*parts, *_buttons(*subs, BUY))


def sub_page(instruction: str, product: Product, name: str) -> Page:
    """Description, features, reviews (there are none) or attributes of a product."""
    contents: dict[str, Sequence[str]] = {
        DESCRIPTION: (product.description,),
        FEATURES: product.bullets,
        ATTRIBUTES: product.attributes,
    }
    parts = [*_head(instruction), *_buttons(BACK, PREVIOUS)]
    return (*parts, *(Part(text) for text in contents.get(name, ())))


def done_page(reward: float) -> Page:
    """The end; the official page goes on with fields that are all `None` in the text form."""
    texts = ("Thank you for shopping with us!", "Your code:", "None")
    return tuple(map(Part, (*texts, "Your score (min 0.0, max 1.0)", str(reward))))


def as_text(page: Page) -> str:
    """The observation in mode `text`."""
    return SEPARATOR.join(part.text.strip() for part in page if part.text not in ("", "\n"))


def as_rich_text(page: Page) -> str:
    """The observation in mode `text_rich`: one line a part, buttons and options in brackets."""
    lines = [
        f"You have clicked {part.text}."
        for part in reversed(page)
        if part.kind is Kind.OPTION and part.marked
    ]
    return "\n".join([*lines, *(_rich(part) for part in page if part.text not in ("", "\n"))])


def _rich(part: Part) -> str:
    if part.kind is Kind.TEXT:
        return part.text
    word = "clicked button" if part.marked else "button"
    indent = {Kind.PRODUCT: "\n", Kind.OPTION: "  "}.get(part.kind, "")
    return f"{indent}[{word}] {part.text} [{word}_]"


def clickables(page: Page) -> list[str]:
    """What `click[...]` understands on a page: buttons, product ids, option values."""
    first = [p.text.lower() for p in page if p.kind in (Kind.BUTTON, Kind.PRODUCT)]
    values = [p.text for p in page if p.kind is Kind.OPTION]
    return list(dict.fromkeys([*first, *values]))


def shown_rows(hits: Sequence[int], number: int) -> Sequence[int]:
    """The rows on page `number`; none beyond the last."""
    return hits[PAGE_SIZE * (number - 1) : PAGE_SIZE * number]
