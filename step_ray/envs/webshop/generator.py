"""A generated shop in the official input format: products, options and instructions from a seed.

Takes a number of products and a seed, writes the three official files. The same arguments give the
same bytes. It converts nothing (catalogue.py does).
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRODUCTS_FILE, ANNOTATIONS_FILE = "items_shuffle.json", "items_ins_v2.json"
HUMAN_FILE = "items_human_ins.json"
_ASIN_LETTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of product."""

    category: str
    query: str
    path: tuple[str, str]
    options: tuple[str, ...]
    attributes: tuple[str, ...]


_KINDS = (
    *(
        _Kind("fashion", query, ("Clothing", "Shirts"), ("color", "size"), attributes)
        for query, attributes in (
            ("shirts", ("machine wash", "long sleeve", "classic fit", "dry clean")),
            ("jackets", ("water resistant", "long sleeve", "hand wash", "quality polyester")),
            ("socks", ("machine wash", "moisture wicking", "soft material", "arch support")),
        )
    ),
    *(
        _Kind("beauty", query, ("Beauty", "Care"), ("scent", "size"), attributes)
        for query, attributes in (
            ("shampoo", ("sulfate free", "natural ingredients", "dry hair", "tea tree")),
            ("lotion", ("fragrance free", "sensitive skin", "coconut oil", "cruelty free")),
            ("lip balm", ("long lasting", "natural ingredients", "easy carry", "paraben free")),
        )
    ),
    *(
        _Kind("electronics", query, ("Electronics", "Accessories"), ("color", "length"), attributes)
        for query, attributes in (
            ("cables", ("fast charging", "gold plated", "heavy duty", "high speed")),
            ("headphones", ("noise cancelling", "hands free", "long lasting", "light weight")),
            ("chargers", ("fast charging", "easy carry", "wireless charging", "non slip")),
        )
    ),
    *(
        _Kind("garden", query, ("Home", "Furniture"), ("color", "style"), attributes)
        for query, attributes in (
            ("lamps", ("energy efficient", "easy install", "living room", "dining room")),
            ("chairs", ("high density", "easy assemble", "solid wood", "dining room")),
            ("pillows", ("machine washable", "double sided", "living room", "super soft")),
        )
    ),
    *(
        _Kind("grocery", query, ("Grocery", "Snacks"), ("flavor", "size"), attributes)
        for query, attributes in (
            ("cookies", ("gluten free", "dairy free", "individually wrapped", "low sugar")),
            ("tea", ("caffeine free", "non gmo", "usda organic", "natural flavors")),
            ("nuts", ("low sodium", "non gmo", "high protein", "dry roasted")),
        )
    ),
)
_VALUES = {
    "color": ("Black", "White", "Red", "Navy Blue", "Green", "Grey", "Pink", "Brown"),
    "size": ("Small", "Medium", "Large", "X-Large", "1 Pack", "2 Pack"),
    "scent": ("Lemon", "Rose", "Mint", "Vanilla", "Unscented"),
    "length": ("3 Feet", "6 Feet", "10 Feet", "15 Feet"),
    "style": ("Modern", "Vintage", "Plain", "Classic"),
    "flavor": ("Honey", "Ginger", "Berry", "Chocolate", "Salted"),
}
_SYLLABLES = ("ba", "ko", "li", "mar", "ten", "vo", "sun", "dra", "pel", "quin", "zor", "fa")


def generate_shop(folder: Path, num_products: int, seed: int) -> None:
    """Write the three files of a shop; identical files are left alone."""
    rng = random.Random(f"webshop shop/{seed}/{num_products}")
    products, notes, human = [], {}, {}
    asins: set[str] = set()
    for number in range(num_products):
        asin = _new_asin(rng, asins)
        kind = _KINDS[number % len(_KINDS)]
        attributes = rng.sample(kind.attributes, rng.randint(2, 3))
        product = _product(rng, kind, asin, attributes)
        products.append(product)
        wanted = sorted(rng.sample(attributes, rng.randint(1, 2)))
        notes[asin] = {
            "attributes": attributes,
            "instruction": f"Find me {', '.join(wanted)} {kind.query}",
            "instruction_attributes": wanted,
        }
        human[asin] = [_human(rng, kind, asin, wanted, product["customization_options"])]
    rng.shuffle(products)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PRODUCTS_FILE, products)
    _write(folder / ANNOTATIONS_FILE, notes)
    _write(folder / HUMAN_FILE, human)


def _new_asin(rng: random.Random, taken: set[str]) -> str:
    while True:
        asin = "B0" + "".join(rng.choices(_ASIN_LETTERS, k=8))
        if asin not in taken:
            taken.add(asin)
            return asin


def _product(
    rng: random.Random, kind: _Kind, asin: str, attributes: Sequence[str]
) -> dict[str, Any]:
    brand = "".join(rng.sample(_SYLLABLES, rng.randint(2, 3))).capitalize()
    words = " ".join(attributes).title()
    low = round(rng.uniform(3, 120), 2)
    ranged = rng.random() < 0.1
    return {
        "asin": asin,
        "name": f"{brand} {kind.query.title()}, {words}",
        "full_description": f"{brand} {kind.query}: {attributes[0]}, made to last.",
        "small_description": [f"{attribute.capitalize()}." for attribute in attributes],
        "pricing": f"${low} - ${round(1.5 * low, 2)}" if ranged else f"${low}",
        "images": [""],
        "category": kind.category,
        "query": kind.query,
        "product_category": " \u203a ".join((*kind.path, kind.query.title())),
        "customization_options": {
            name.capitalize(): [
                {"value": value} for value in rng.sample(_VALUES[name], rng.randint(2, 4))
            ]
            for name in kind.options
        },
    }


def _human(
    rng: random.Random,
    kind: _Kind,
    asin: str,
    wanted: Sequence[str],
    options: dict[str, list[dict[str, str]]],
) -> dict[str, Any]:
    values = [rng.choice(entries)["value"].lower() for entries in options.values()]
    return {
        "asin": asin,
        "instruction": f"i want {kind.query} that are {' and '.join(wanted)}, {', '.join(values)}.",
        "attributes": list(wanted),
        "instruction_attributes": list(wanted),
        "instruction_options": values,
    }


def _write(path: Path, data: object) -> None:
    """Write atomically; leave an identical file alone."""
    text = json.dumps(data, indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
