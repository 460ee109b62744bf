"""Products: the official records (items_shuffle*.json, items_ins_v2*.json) -> `Product`.

Takes records, gives products by the official rules; what these leave open and cannot be used is
refused with the position of the record. It writes nothing and builds no index.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_ray.envs.webshop.tables import DEFAULT_PRICE, MAX_ASIN
from step_ray.errors import DataError

_CHUNK = 1 << 22
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_NOT_PRICE = re.compile(r"[^\d.]")
_BETWEEN = re.compile(r"[\s,]*")
DUMMY_ATTRIBUTE = "DUMMY_ATTR"
"""Attribute of a product that the annotation file lacks."""
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One product, as its pages and the reward need it."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    category: str
    """One of `tables.CATEGORIES`."""
    query: str
    """The search that once found it; lower case."""
    product_category: str
    """Path of names, separated by \u203a."""
    prices: tuple[float, ...]
    """One price or lowest and highest, dollars."""
    price_tag: str
    """The price as the pages show it."""
    options: tuple[tuple[str, tuple[str, ...]], ...]
    """Option name and its values, in the order of the file."""
    attributes: tuple[str, ...]
    instruction: str
    """Instruction of the synthetic goals; empty: it has none."""
    instruction_attributes: tuple[str, ...]

    def price(self, seed: int) -> float:
        """The price in dollars; within a range it is drawn, once for a seed and product."""
        if len(self.prices) == 1:
            return self.prices[0]
        return random.Random(f"webshop price/{seed}/{self.asin}").uniform(*self.prices)

    def index_text(self) -> str:
        """What the search engine reads of it."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options)
        first = self.bullets[0] if self.bullets else ""
        return " ".join((self.title, self.description, first, options)).lower()


def read_products(
    products: Path, annotations: Path, num_products: int | None = None
) -> Iterator[Product]:
    """The products of the first `num_products` records of a file, in its order.

    Left out, by the official rules: asins that are `nan`, too long or repeated.

    Raises:
        DataError: a file or a record cannot be used.
    """
    notes = _read_json(annotations)
    if not isinstance(notes, dict):
        raise DataError(f"{annotations}: no JSON object of asins; get the file again")
    seen: set[str] = set()
    for position, record in enumerate(stream_records(products)):
        if position == num_products:
            return
        where = f"{products}: record {position}"
        asin = str(record.get("asin", "nan"))
        if asin == "nan" or len(asin) > MAX_ASIN or asin in seen:
            continue
        seen.add(asin)
        yield parse_product(record, notes.get(asin), where)


def parse_product(record: Record, note: Record | None, where: str) -> Product:
    """A product from its record and its annotation.

    Raises:
        DataError: a field is missing or of another kind; `where` is named.
    """
    try:
        prices, tag = parse_price(record.get("pricing") or "")
        note = note or {}
        attributes = note.get("attributes", (DUMMY_ATTRIBUTE,))
        return Product(
            asin=clean(record["asin"]),
            title=clean(record["name"]),
            description=clean(record.get("full_description") or ""),
            bullets=_texts(record.get("small_description")),
            category=clean(record["category"]),
            query=clean(record["query"]).lower().strip(),
            product_category=clean(record["product_category"]),
            prices=prices,
            price_tag=tag,
            options=_options(record.get("customization_options")),
            attributes=tuple(clean(x) for x in attributes),
            instruction=clean(note.get("instruction") or ""),
            instruction_attributes=tuple(clean(x) for x in note.get("instruction_attributes", ())),
        )
    except KeyError as exc:
        raise DataError(f"{where}: the field {exc} is missing; mend or remove the record") from exc
    except (TypeError, ValueError, AttributeError) as exc:
        raise DataError(f"{where}: {exc}; mend or remove the record") from exc


def clean(text: str) -> str:
    """The text without control characters, which no page can show; each becomes a space.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no text")
    return _CONTROL.sub(" ", text)


def parse_price(text: str) -> tuple[tuple[float, ...], str]:
    """Prices in dollars (one, or lowest and highest) and the text that pages show."""
    found = [float(_NOT_PRICE.sub("", part)) for part in text.split("$")[1:]]
    if not found:
        return (DEFAULT_PRICE,), f"${DEFAULT_PRICE}"
    if len(found) == 1:
        return (found[0],), f"${found[0]}"
    return (found[0], found[1]), f"${found[0]} to ${found[1]}"


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value] if value else []
    return tuple(clean(text) for text in values)


def _options(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Option name -> values; a name that comes twice in other letters keeps its later values."""
    options: dict[str, tuple[str, ...]] = {}
    for name, entries in (value or {}).items():
        if entries:
            values = (clean(entry["value"]).strip() for entry in entries)
            options[clean(name).lower()] = tuple(v.replace("/", " | ").lower() for v in values)
    return tuple(options.items())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise DataError(f"{path}: cannot be read as JSON ({exc}); get the file again") from exc


def read_human_instructions(path: Path) -> Mapping[str, Sequence[Record]]:
    """asin -> records of items_human_ins.json.

    Raises:
        DataError: the file cannot be read.
    """
    data = _read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: no JSON object of asins; get the file again")
    return data


def stream_records(path: Path) -> Iterator[Record]:
    """The objects of a JSON list, one after another: the full file is 5 GB.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    decoder, text, position = json.JSONDecoder(), "", 0
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK).lstrip("\ufeff \t\r\n")
            if not text.startswith("["):
                raise DataError(f"{path}: no JSON list of products; get the file again")
            start = 1
            while True:
                between = _BETWEEN.match(text, start)
                start = between.end() if between else start
                if text[start : start + 1] == "]":
                    return
                try:
                    record, start = decoder.raw_decode(text, start)
                except ValueError:
                    more = file.read(max(_CHUNK, len(text) - start))
                    if not more:
                        raise
                    text, start = text[start:] + more, 0
                    continue
                if not isinstance(record, dict):
                    raise DataError(f"{path}: record {position} is no JSON object; remove it")
                yield record
                position += 1
    except (OSError, ValueError) as exc:
        raise DataError(f"{path}: record {position} cannot be read as JSON ({exc})") from exc
