"""Checks against recordings: reward vectors, searches, whole episodes.

Takes recorded data (AgentGym's conversations, scored purchases) and a catalogue, gives counts of
what is the same and what is not. It plays no tasks.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from step_ray.envs.webshop import pages
from step_ray.envs.webshop.catalogue import Catalogue
from step_ray.envs.webshop.goals import GoalRecord
from step_ray.envs.webshop.reward import Goal, score
from step_ray.envs.webshop.session import Session, parse_action
from step_ray.envs.webshop.tables import PAGE_SIZE

PRICE_LIMIT = "price limit of the instruction"
"""The one class of difference that is by design: the official limits follow no seed."""
_LIMIT = re.compile(r", and price lower than [\d.]+ dollars")
_ACTION = re.compile(r"Action:\s*(.*)", re.S)
_FACTS = ("attribute_hits", "option_hits", "price_ok", "query_match", "category_match")
Turn = tuple[str, str | None]
"""Recorded observation, and the action that followed; None after the last one."""


@dataclass(slots=True)
class SearchReport:
    """Recorded searches against ours."""

    searches: int = 0
    first_same: int = 0
    all_same: int = 0
    """The whole page in the same order."""
    overlap: float = 0.0
    """Sum over the searches of the share of the recorded page that ours has."""


@dataclass(slots=True)
class ReplayReport:
    """Recorded steps against ours, by class of difference."""

    episodes: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def read_episodes(path: Path) -> Iterator[tuple[int, list[Turn]]]:
    """Goal position and turns of AgentGym's conversations."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts = [message["value"] for message in record["conversations"]]
        turns = texts[2:]  # the first two are the rules and an "Ok."
        actions = [match[1].strip() for text in turns[1::2] if (match := _ACTION.search(text))]
        padded: list[str | None] = [*actions, None]
        position = int(record["item_id"].removeprefix("webshop_"))
        yield position, list(zip(turns[::2], padded, strict=False))


def compare_searches(episodes: Iterable[Sequence[Turn]], catalogue: Catalogue) -> SearchReport:
    """Compare the first pages of the recorded searches."""
    report = SearchReport()
    for turns in episodes:
        for (_, action), (page, _) in pairwise(turns):
            name, argument = parse_action(action or "")
            shown = [part for part in page.split(pages.SEPARATOR) if _is_product(part, catalogue)]
            if name != "search" or not shown:
                continue
            rows = catalogue.hits(argument.strip())[:PAGE_SIZE]
            ours = [catalogue.product(row).asin for row in rows]
            report.searches += 1
            report.first_same += ours[:1] == shown[:1]
            report.all_same += ours == shown
            report.overlap += len(set(ours) & set(shown)) / len(shown)
    return report


def _is_product(text: str, catalogue: Catalogue) -> bool:
    return text.isalnum() and text.isascii() and catalogue.row(text) is not None


def replay(
    episodes: Iterable[tuple[int, Sequence[Turn]]],
    goals: Sequence[GoalRecord],
    catalogue: Catalogue,
    recorded_limits: bool,
) -> ReplayReport:
    """Play the recorded actions and compare every observation.

    Args:
        episodes: goal position and turns.
        goals: ours, in the official order.
        catalogue: the shop.
        recorded_limits: take the price limit of the recording into the instruction.
    """
    report = ReplayReport()
    for position, turns in episodes:
        report.episodes += 1
        instruction = goals[position].instruction
        if recorded_limits:
            limit = _LIMIT.search(turns[0][0])
            instruction = _LIMIT.sub("", instruction) + (limit[0] if limit else "")
        session = Session(catalogue, instruction)
        for number, (recorded, action) in enumerate(turns):
            kind = difference(pages.as_text(session.page()), recorded)
            report.steps[kind] += 1
            report.examples.setdefault(kind, f"goal {position}, observation {number}")
            if action is not None:
                session.do(action)
    return report


def difference(ours: str, recorded: str) -> str:
    """The class of the difference of two observations."""
    if ours == recorded:
        return "identical"
    if _LIMIT.sub("", ours) == _LIMIT.sub("", recorded):
        return PRICE_LIMIT
    left, right = ours.split(pages.SEPARATOR), recorded.split(pages.SEPARATOR)
    if sorted(_LIMIT.sub("", x) for x in left) == sorted(_LIMIT.sub("", x) for x in right):
        return "order of the parts"
    return "other results" if "Page " in ours and "Page " in recorded else "other"


def check_vector(vector: Mapping[str, Any], catalogue: Catalogue) -> list[str]:
    """What a scored purchase says otherwise than our reward; empty when all is the same."""
    options = vector["goal_options"]
    pairs = options.items() if isinstance(options, Mapping) else (("", text) for text in options)
    goal = Goal(
        product=catalogue.find(vector["goal_asin"]),
        attributes=tuple(vector["goal_attributes"]),
        options=tuple(pairs),
        price_upper=vector["price_upper"],
    )
    bought = catalogue.find(vector["bought_asin"])
    ours = score(bought, list(vector["options"].values()), vector["price"], goal)
    wrong = [name for name in _FACTS if getattr(ours, name) != vector[name]]
    if "reward" in vector and abs(ours.reward - vector["reward"]) > 1e-9:
        wrong.append("reward")
    return wrong
