"""The catalogue: products and their search index in a compact folder that processes share.

Takes the official files once (`build_catalogue`), then opens the folder memory-mapped: an Arrow
file of products, a sorted array of ids, the index. Nothing in it is ever changed.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from step_ray.envs.webshop.products import (
    Product,
    Record,
    read_human_instructions,
    read_products,
)
from step_ray.envs.webshop.search import IndexBuilder, SearchIndex
from step_ray.envs.webshop.tables import MAX_ASIN, MAX_HITS
from step_ray.errors import DataError, EnvError
from step_ray.storage.places import is_url
from step_ray.storage.remote import fetch

FORMAT = 1
"""Version of the folder; others are made again."""
PRODUCTS, ASINS, ROWS, HUMAN, META = (
    *("products.arrow", "asins.npy", "rows.npy", "human.json", "meta.json"),
)
_BATCH = 4096
_CACHED = 2048
"""Products that a process keeps as objects."""
_CACHED_LISTS = 8
"""Lists of a whole category or query, which may name a large part of the shop."""
_TEXTS = pa.list_(pa.large_string())
_SCHEMA = pa.schema(
    [(name, pa.large_string()) for name in ("asin", "title", "description", "category", "query")]
    + [("product_category", pa.large_string()), ("price_tag", pa.string())]
    + [("instruction", pa.large_string()), ("prices", pa.list_(pa.float64()))]
    + [(name, _TEXTS) for name in ("bullets", "attributes", "instruction_attributes")]
    + [("option_names", _TEXTS), ("option_values", pa.list_(_TEXTS))]
)
_PLAIN = [field.name for field in fields(Product) if field.name != "options"]


def fingerprint(files: Sequence[Path], num_products: int | None) -> str:
    """Equal for equal inputs: by size and both ends of the files, which may be gigabytes."""
    digest = sha256(json.dumps([FORMAT, num_products]).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def build_catalogue(
    folder: Path, products: Path, annotations: Path, human: Path, num_products: int | None = None
) -> Path:
    """Convert the official files; gives the folder of the catalogue below `folder`.

    What is there is left alone. The folder appears when it is complete, so a killed conversion
    leaves nothing that would be used.

    Raises:
        DataError: a file or record cannot be used.
    """
    missing = next((path for path in (products, annotations, human) if not path.is_file()), None)
    if missing is not None:
        raise DataError(f"{missing}: the file is missing; get it from the WebShop repository")
    target = folder / fingerprint((products, annotations, human), num_products)
    if (target / META).is_file():
        return target
    part = folder / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir(parents=True)
    try:
        write_catalogue(part, read_products(products, annotations, num_products), human)
        if not target.exists():
            part.rename(target)
    except OSError:
        if not (target / META).is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def write_catalogue(folder: Path, products: Iterator[Product], human: Path) -> None:
    """Write the files of a catalogue into an empty folder, one batch of products at a time."""
    index, asins = IndexBuilder(), []
    with (
        pa.OSFile(str(folder / PRODUCTS), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
    ):
        while batch := list(islice(products, _BATCH)):
            for product in batch:
                index.add(product.asin, product.index_text())
                asins.append(product.asin)
            writer.write_batch(_batch(batch))
    ids = np.array([asin.encode() for asin in asins], dtype=f"S{MAX_ASIN}")
    order = np.argsort(ids, kind="stable")
    np.save(folder / ASINS, ids[order])
    np.save(folder / ROWS, order.astype(np.int32))
    index.save(folder / "index")
    known = set(asins)
    notes = read_human_instructions(human)
    kept = {asin: notes[asin] for asin in notes if asin in known}
    (folder / HUMAN).write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    meta = {"format": FORMAT, "num_products": len(asins)}
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def _batch(products: Sequence[Product]) -> pa.RecordBatch:
    rows = [
        {name: getattr(product, name) for name in _PLAIN}
        | {"option_names": [name for name, _ in product.options]}
        | {"option_values": [list(values) for _, values in product.options]}
        for product in products
    ]
    return pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)


class Catalogue:
    """An open catalogue; reading it is safe from any number of processes.

    Raises:
        EnvError: the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / META).is_file():
            raise EnvError(f"{folder}: no WebShop catalogue; remove the run's games and remake it")
        self.folder = folder
        with pa.memory_map(str(folder / PRODUCTS)) as source:
            self._table = pa.ipc.open_file(source).read_all()
        self._asins = np.load(folder / ASINS, mmap_mode="r")
        self._rows = np.load(folder / ROWS, mmap_mode="r")
        self._index = SearchIndex(folder / "index")
        self.product = lru_cache(maxsize=_CACHED)(self._product)
        self._found = lru_cache(maxsize=_CACHED)(self._searched)
        self._listed = lru_cache(maxsize=_CACHED_LISTS)(self._all_of)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def _product(self, row: int) -> Product:
        return _from_row(self._table.slice(row, 1).to_pylist()[0])

    def products(self) -> Iterator[Product]:
        """All products, in the order of the file."""
        for batch in self._table.to_batches():
            yield from map(_from_row, batch.to_pylist())

    def row(self, asin: str) -> int | None:
        """The row of an id; None: there is no such product."""
        place = int(np.searchsorted(self._asins, asin.encode()))
        found = place < len(self._asins) and self._asins[place] == asin.encode()
        return int(self._rows[place]) if found else None

    def find(self, asin: str) -> Product:
        """The product with an id.

        Raises:
            DataError: there is none.
        """
        row = self.row(asin)
        if row is None:
            raise DataError(f"asin: {asin!r} is not in the catalogue {self.folder}")
        return self.product(row)

    def hits(self, keywords: str) -> tuple[int, ...]:
        """Rows that a search shows: the 50 best, or all of a category, query or attribute.

        `<c> garden`, `<q> lamps` and `<a> easy install` list in the order of the file.
        """
        first, _, rest = keywords.partition(" ")
        if first in ("<c>", "<q>", "<a>"):
            return self._listed(first, " ".join(rest.split()))
        return self._found(keywords)

    def _searched(self, keywords: str) -> tuple[int, ...]:
        return tuple(self._index.search(keywords, MAX_HITS))

    def _all_of(self, first: str, wanted: str) -> tuple[int, ...]:
        if first == "<c>":
            return self._where(pc.equal(self._table["category"], wanted.partition(" ")[0]))
        if first == "<q>":
            return self._where(pc.equal(self._table["query"], wanted))
        lists = self._table["attributes"].combine_chunks()
        rows = pc.list_parent_indices(lists).filter(pc.equal(pc.list_flatten(lists), wanted))
        return tuple(sorted(set(rows.to_pylist())))

    @staticmethod
    def _where(mask: pa.ChunkedArray) -> tuple[int, ...]:
        return tuple(np.flatnonzero(mask.to_numpy()).tolist())

    def human_instructions(self) -> dict[str, list[Record]]:
        """asin -> records of human instructions."""
        data: dict[str, list[Record]] = json.loads((self.folder / HUMAN).read_text("utf-8"))
        return data


def _from_row(row: dict[str, Any]) -> Product:
    values = {name: row[name] for name in _PLAIN}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    pairs = zip(row["option_names"], map(tuple, row["option_values"]), strict=True)
    return Product(**values | lists, options=tuple(pairs))


def open_catalogue(folder: str | os.PathLike[str]) -> Catalogue:
    """The catalogue of a folder, or of an address in a run's store; a process opens it once."""
    place = str(folder)
    return _opened(place if is_url(place) else str(Path(folder).resolve()))


@lru_cache(maxsize=4)
def _opened(place: str) -> Catalogue:
    return Catalogue(fetch(place))
