"""The search engine: BM25 as Lucene computes it, over arrays that processes share.

Takes texts once, writes an index folder; opens it memory-mapped and gives the best rows for a
query. Scoring and storage are bm25s; the weights are Lucene's, whose document lengths fit in a byte
and are rounded accordingly. It knows no products.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import bm25s
import numpy as np

from step_ray.envs.webshop.analysis import analyse
from step_ray.envs.webshop.tables import MAX_HITS
from step_ray.errors import DataError

K1, B = 0.9, 0.4
TERMS = "terms.npy"
"""Sorted 64-bit hashes of the terms; a term's id is its position."""
RANKS = "ranks.npy"
"""Place of each row's name among all names: of equal scores the smaller name comes first."""
_EXACT_LENGTHS = 40
"""Document lengths below it are stored exactly."""


def term_hash(term: str) -> int:
    """64 bits that stand for a term."""
    return int.from_bytes(blake2b(term.encode(), digest_size=8).digest(), "big")


def stored_length(length: int) -> int:
    """A document length as Lucene's one-byte norm keeps it: 4 significant bits above 24."""
    excess = length - 24
    shift = max(0, excess.bit_length() - 4)
    return length if length < _EXACT_LENGTHS else 24 + (excess >> shift << shift)


class IndexBuilder:
    """Gathers the terms of documents, one at a time, then writes the index.

    Memory: 12 bytes for each distinct term of a document, and the vocabulary.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._terms = array("i")
        self._rows = array("i")
        self._counts = array("i")
        self._lengths = array("i")
        self._names: list[str] = []

    def add(self, name: str, text: str) -> None:
        """Add the next document."""
        terms, row = analyse(text), len(self._lengths)
        self._names.append(name)
        self._lengths.append(len(terms))
        for term, count in Counter(terms).items():
            self._terms.append(self._ids.setdefault(term, len(self._ids)))
            self._rows.append(row)
            self._counts.append(count)

    def save(self, folder: Path) -> None:
        """Write the index: the sorted terms, and the weights in bm25s's format.

        Raises:
            DataError: there is no document, or two terms share a hash.
        """
        if not self._ids:
            raise DataError(f"{folder}: there is nothing to index; give products with texts")
        hashes = np.fromiter(map(term_hash, self._ids), dtype=np.uint64, count=len(self._ids))
        order = np.argsort(hashes)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        terms = rank[np.frombuffer(self._terms, dtype=np.int32)]
        if len(np.unique(hashes)) != len(hashes):
            raise DataError(f"{folder}: two terms share a hash; this is a bug, report it")
        by_term = np.argsort(terms, kind="stable")
        rows = np.frombuffer(self._rows, dtype=np.int32)[by_term]
        counts = np.frombuffer(self._counts, dtype=np.int32)[by_term]
        frequencies = np.bincount(terms, minlength=len(order))
        engine = bm25s.BM25(k1=K1, b=B, method="lucene")
        engine.scores = {
            "data": self._weights(frequencies, rows, counts),
            "indices": rows,
            "indptr": np.concatenate(([0], np.cumsum(frequencies))).astype(np.int64),
            "num_docs": len(self._lengths),
        }
        engine.vocab_dict, engine.nonoccurrence_array = {}, None
        engine.save(folder, show_progress=False)
        np.save(folder / TERMS, hashes[order])
        np.save(folder / RANKS, np.argsort(np.argsort(self._names)).astype(np.int32))

    def _weights(self, frequencies: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """BM25 weight of every posting, [postings] float32, postings sorted by term."""
        num_docs = len(self._lengths)
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        kept = np.fromiter(map(stored_length, self._lengths), dtype=np.float64, count=num_docs)
        norms = K1 * (1 - B + B * kept / lengths.mean())
        idf = np.log1p((num_docs - frequencies + 0.5) / (frequencies + 0.5))
        weights = np.repeat(idf, frequencies) * counts / (counts + norms[rows])
        return weights.astype(np.float32)


class SearchIndex:
    """An index folder, memory-mapped.

    Raises:
        DataError: the folder holds no index.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._terms = np.load(folder / TERMS, mmap_mode="r")
            self._ranks = np.load(folder / RANKS, mmap_mode="r")
            self._engine = bm25s.BM25.load(folder, mmap=True, load_vocab=False, show_progress=False)
        except (OSError, ValueError) as exc:
            raise DataError(f"{folder}: no search index ({exc}); remove it, it is remade") from exc

    def search(self, query: str, limit: int = MAX_HITS) -> list[int]:
        """The rows that match best, best first; rows without any term of the query never.

        Of equal scores the smaller name comes first.
        """
        ids = self._known(analyse(query))
        if not ids:
            return []
        scores = self._engine.get_scores_from_ids(ids)
        rows = np.flatnonzero(scores > 0)
        if len(rows) > limit:
            least = np.partition(scores[rows], -limit)[-limit]
            rows = rows[scores[rows] >= least]
        best = np.lexsort((self._ranks[rows], -scores[rows]))[:limit]
        return [int(row) for row in rows[best]]

    def _known(self, terms: Sequence[str]) -> list[int]:
        """Ids of the terms that the index has; repeats count again, as in Lucene."""
        hashes = np.array([term_hash(term) for term in terms], dtype=np.uint64)
        places = np.searchsorted(self._terms, hashes)
        places[places == len(self._terms)] = 0
        return [int(place) for place in places[self._terms[places] == hashes]]
