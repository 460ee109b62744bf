"""What calls cost: calls, tokens and money, added up.

Takes and gives `Spending` records. It asks no model and keeps no count.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from step_ray.types import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """An amount that was, or may be, spent on LLM calls."""

    calls: int = 0
    tokens: int = 0
    """Prompt and completion together."""
    money: float = 0.0
    """In the unit of the price table."""

    def __add__(self, other: "Spending") -> "Spending":
        return Spending(
            calls=self.calls + other.calls,
            tokens=self.tokens + other.tokens,
            money=self.money + other.money,
        )

    def __sub__(self, other: "Spending") -> "Spending":
        return Spending(
            calls=self.calls - other.calls,
            tokens=self.tokens - other.tokens,
            money=self.money - other.money,
        )

    def or_more(self, other: "Spending") -> "Spending":
        """The larger of the two, field by field."""
        return Spending(
            calls=max(self.calls, other.calls),
            tokens=max(self.tokens, other.tokens),
            money=max(self.money, other.money),
        )


NOTHING = Spending()


def budgeted_spending(usages: Iterable[Usage]) -> Spending:
    """What episodes took from a budget: calls and tokens of the teacher, money of both models."""
    total = NOTHING
    for usage in usages:
        tokens = usage.teacher_prompt_tokens + usage.teacher_completion_tokens
        money = usage.teacher_cost + usage.student_cost
        total += Spending(calls=usage.teacher_calls, tokens=tokens, money=money)
    return total
