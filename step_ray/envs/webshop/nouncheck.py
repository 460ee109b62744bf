"""How much the noun tagger matters: r_type of random purchases under several taggers.

Takes a catalogue, gives lines of a table. The official tagger is a model that is not at hand; its
substitute is compared with textblob's rule tagger and with the extremes that a tagger can reach.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from step_ray.envs.webshop.catalogue import Catalogue
from step_ray.envs.webshop.products import Product
from step_ray.envs.webshop.reward import nouns, same_category, type_factor

Tagger = Callable[[str], Sequence[str]]


def report(catalogue: Catalogue, num_pairs: int, seed: int) -> list[str]:
    """Shares of random purchases whose r_type another tagger would change.

    Half of the pairs are any two products, half share the query or the category.
    """
    lines = []
    for what, pairs in _samples(catalogue, num_pairs, seed).items():
        ours = [factor(bought, wanted, nouns) for bought, wanted in pairs]
        lines.append(f"r_type of {len(pairs)} random purchases, {what}:")
        for name, tagger in _others():
            theirs = [factor(bought, wanted, tagger) for bought, wanted in pairs]
            higher = sum(o > t for o, t in zip(ours, theirs, strict=True))
            lower = sum(o < t for o, t in zip(ours, theirs, strict=True))
            changed = 100 * (higher + lower) / max(len(pairs), 1)
            lines.append(
                f"  {name}: {changed:.2f} % differ (ours is higher in {higher}, lower in {lower})"
            )
    return lines


def factor(bought: Product, wanted: Product, tagger: Tagger) -> float:
    """r_type of a purchase with nouns by `tagger`."""
    names = tagger(wanted.title)
    similarity = len(set(tagger(bought.title)) & set(names)) / len(names) if names else 0.2
    matches = bought.query == wanted.query or same_category(bought, wanted)
    return type_factor(matches, similarity)


def _samples(
    catalogue: Catalogue, num_pairs: int, seed: int
) -> dict[str, list[tuple[Product, Product]]]:
    products = list(catalogue.products())
    rng = random.Random(f"webshop nouns/{seed}")
    kin: dict[str, list[Product]] = {}
    for product in products:
        kin.setdefault(product.query, []).append(product)
    large = [group for group in kin.values() if len(group) > 1]
    related = [tuple(rng.sample(rng.choice(large), 2)) for _ in range(num_pairs if large else 0)]
    return {
        "any two products": [
            (rng.choice(products), rng.choice(products)) for _ in range(num_pairs)
        ],
        "of one query": [(left, right) for left, right in related],
    }


def _others() -> Iterator[tuple[str, Tagger]]:
    yield "without words that end like adjectives, adverbs or verbs", _without_endings
    try:
        from textblob.en.taggers import PatternTagger
    except ModuleNotFoundError:
        return
    tagger = PatternTagger()

    def pattern(title: str) -> list[str]:
        tags = tagger.tag(title)
        return [w.lower() for w, tag in tags if tag.startswith("NN") and any(map(str.isalpha, w))]

    yield "textblob's PatternTagger", pattern


def _without_endings(title: str) -> list[str]:
    endings = ("able", "ible", "ful", "less", "ous", "ive", "ly", "ing", "ed", "ish", "al")
    return [word for word in nouns(title) if len(word) < 5 or not word.endswith(endings)]
