"""Goals: what an instruction asks for, synthetic or human, in the official order.

Takes a catalogue and a seed of price limits, gives goals, and puts a goal into a task's params and
back. Which of them are held out is tasks.py's business.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product as cross

from step_ray.envs.webshop.catalogue import Catalogue
from step_ray.envs.webshop.products import Product, Record, clean
from step_ray.envs.webshop.reward import Goal
from step_ray.envs.webshop.tables import GOAL_SEED, NO_PRICE_LIMIT, PRICE_STEPS
from step_ray.errors import DataError, EnvError
from step_ray.storage.places import place_of
from step_ray.types import Task

_LIMITS_DRAWN_FROM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GoalRecord:
    """One goal."""

    kind: str
    """`synthetic` or `human`."""
    asin: str
    category: str
    instruction: str
    """As the pages show it, price limit included."""
    attributes: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    """Name and value; human goals have values only, their names are empty."""
    price_upper: float
    """Dollars."""
    number: int = 0
    """How many goals of equal content come before it in the catalogue."""

    def content(self) -> str:
        """Equal for goals that ask for the same, whatever their price limits."""
        text = self.instruction.partition(", and price lower than ")[0]
        key = [self.kind, self.asin, text, self.attributes, self.options]
        return sha256(json.dumps(key).encode()).hexdigest()[:12]


def list_goals(catalogue: Catalogue, kind: str, price_seed: int) -> list[GoalRecord]:
    """All goals of a kind, in the official order: by product, then shuffled with seed 233.

    The official price limits differ from start to start; here they follow from `price_seed`.

    Raises:
        DataError: a record of a human instruction cannot be used.
    """
    make = _synthetic if kind == "synthetic" else _human
    goals = list(make(catalogue, price_seed))
    random.Random(GOAL_SEED).shuffle(goals)
    return goals


def _synthetic(catalogue: Catalogue, price_seed: int) -> Iterator[GoalRecord]:
    for product in catalogue.products():
        if not product.instruction:
            continue
        upper, limit = draw_limit(product, price_seed, product.asin)
        groups = sorted(product.options)
        seen: Counter[tuple[str, ...]] = Counter()
        for values in cross(*(values for _, values in groups)):
            options = tuple((name, v) for (name, _), v in zip(groups, values, strict=True))
            listed = ", and ".join(f"{name}: {value}" for name, value in options)
            yield GoalRecord(
                kind="synthetic",
                asin=product.asin,
                category=product.category,
                instruction=product.instruction + (f" with {listed}" if listed else "") + limit,
                attributes=product.instruction_attributes,
                options=options,
                price_upper=upper,
                number=seen[values],
            )
            seen[values] += 1


def _human(catalogue: Catalogue, price_seed: int) -> Iterator[GoalRecord]:
    instructions = catalogue.human_instructions()
    for product in catalogue.products():
        seen: Counter[str] = Counter()
        for position, record in enumerate(instructions.get(product.asin, ())):
            goal = _human_goal(product, record, position, price_seed)
            if goal.attributes:
                content = goal.content()
                yield replace(goal, number=seen[content])
                seen[content] += 1


def _human_goal(product: Product, record: Record, position: int, price_seed: int) -> GoalRecord:
    try:
        upper, limit = draw_limit(product, price_seed, f"{product.asin}/{position}")
        return GoalRecord(
            kind="human",
            asin=product.asin,
            category=product.category,
            instruction=clean(record["instruction"]).strip(".") + limit,
            attributes=tuple(clean(x) for x in record["instruction_attributes"]),
            options=tuple(("", clean(x)) for x in record["instruction_options"]),
            price_upper=upper,
        )
    except (KeyError, TypeError) as exc:
        raise DataError(
            f"items_human_ins: record {position} of {product.asin}: {type(exc).__name__} {exc};"
            " mend or remove the record"
        ) from exc


def draw_limit(product: Product, seed: int, key: str) -> tuple[float, str]:
    """A goal's upper price in dollars, and the words that say so in the instruction.

    The larger of two of the first four round prices above the product's; none if there are not two.
    """
    price = product.price(seed)
    above = [step for step in PRICE_STEPS if step > price][:_LIMITS_DRAWN_FROM]
    if len(above) < 2:
        return NO_PRICE_LIMIT, ""
    upper = float(max(random.Random(f"webshop limit/{seed}/{key}").sample(above, 2)))
    return upper, f", and price lower than {upper:.2f} dollars"


def make_task(record: GoalRecord, catalogue: Catalogue, split: str, price_seed: int) -> Task:
    """The task of a goal; its id names product and content, never a position."""
    again = f"-{record.number + 1}" if record.number else ""
    return Task(
        task_id=f"webshop/{record.kind}/{record.asin}/{record.content()}{again}",
        env="webshop",
        split=split,
        goal=record.instruction,
        task_type=record.category,
        params={
            "catalogue": place_of(catalogue.folder),
            "asin": record.asin,
            "attributes": json.dumps(record.attributes),
            "options": json.dumps(record.options),
            "price_upper": str(record.price_upper),
            "price_seed": str(price_seed),
            "content": record.content(),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """What a task's params say."""

    folder: str
    """Of the catalogue."""
    asin: str
    attributes: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    price_upper: float
    price_seed: int

    def goal(self, catalogue: Catalogue) -> Goal:
        """The goal, for the reward."""
        return Goal(
            product=catalogue.find(self.asin),
            attributes=self.attributes,
            options=self.options,
            price_upper=self.price_upper,
        )


def load_task(task: Task) -> LoadedTask:
    """Read a task's params.

    Raises:
        EnvError: they are no WebShop goal.
    """
    params = task.params
    try:
        return LoadedTask(
            folder=params["catalogue"],
            asin=params["asin"],
            attributes=tuple(json.loads(params["attributes"])),
            options=tuple((name, value) for name, value in json.loads(params["options"])),
            price_upper=float(params["price_upper"]),
            price_seed=int(params["price_seed"]),
        )
    except (KeyError, ValueError, TypeError) as exc:
        raise EnvError(
            f"{task.task_id}: its params are no WebShop goal ({type(exc).__name__}: {exc});"
            " remake the task lists"
        ) from exc
