"""A gate: many callers, few messages, nothing reserved for a caller that has gone."""

import asyncio

import pytest

from step_ray.calls.desk import TeacherDesk
from step_ray.calls.gate import Answer, DeskGate, Settled
from step_ray.calls.spending import NOTHING, Spending
from step_ray.collection.teacher_config import BudgetConfig, TeacherConfig
from step_ray.errors import BudgetError, LLMError

CALL = Spending(calls=1, tokens=10)


class Desk:
    """Answers what `reply` says, and keeps the messages; `open` holds its answers back."""

    def __init__(self, reply=lambda asks: Answer(turns=(0.0,) * len(asks))):
        self.reply, self.messages = reply, []
        self.open = asyncio.Event()
        self.open.set()

    async def serve(self, asks, settled, pause_s):
        self.messages.append((list(asks), list(settled), pause_s))
        await self.open.wait()
        return self.reply(asks)


def sizes(desk):
    return [len(asks) for asks, _, _ in desk.messages]


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_callers_that_come_while_a_question_is_under_way_share_the_next():
    async def scene():
        desk = Desk()
        gate = DeskGate(desk.serve)
        desk.open.clear()
        first = asyncio.create_task(gate.enter(CALL))
        await settle()
        others = [asyncio.create_task(gate.enter(CALL)) for _ in range(50)]
        await settle()
        assert sizes(desk) == [1]
        desk.open.set()
        await asyncio.gather(first, *others)
        return sizes(desk)

    assert asyncio.run(scene()) == [1, 50]


def test_what_a_call_cost_and_a_pause_reach_the_desk_without_a_further_call():
    async def scene():
        desk = Desk()
        gate = DeskGate(desk.serve)
        gate.leave(CALL, NOTHING)
        gate.pause(3.0)
        gate.pause(2.0)
        await gate.flush()
        return desk.messages

    assert asyncio.run(scene()) == [([], [Settled(estimate=CALL, actual=NOTHING)], 3.0)]


def test_those_who_get_no_turn_yet_ask_again_and_are_served_first():
    async def scene():
        desk = Desk(lambda asks: Answer(turns=(0.0,)))  # one at a time
        gate, order = DeskGate(desk.serve), []

        async def enter(name):
            await gate.enter(CALL)
            order.append(name)

        await asyncio.gather(*(enter(name) for name in "abc"))
        return order, sizes(desk)

    assert asyncio.run(scene()) == (["a", "b", "c"], [3, 2, 1])


def test_a_refusal_is_a_budget_error_for_that_caller_only():
    async def scene():
        desk = Desk(lambda asks: Answer(turns=(0.0, "it is spent", 0.0)))
        gate = DeskGate(desk.serve)
        return await asyncio.gather(*(gate.enter(CALL) for _ in range(3)), return_exceptions=True)

    first, second, third = asyncio.run(scene())
    assert (first, third) == (None, None)
    assert isinstance(second, BudgetError)
    assert str(second) == "it is spent"


@pytest.mark.parametrize("answered", [True, False])
def test_a_caller_that_gives_up_frees_what_was_reserved_for_it(answered):
    async def scene():
        desk = Desk(lambda asks: Answer(turns=(3600.0,) * len(asks)))  # a turn in an hour
        gate = DeskGate(desk.serve)
        if not answered:
            desk.open.clear()
        caller = asyncio.create_task(gate.enter(CALL))
        await settle()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        desk.open.set()
        await gate.flush()
        return [settled for _, settled, _ in desk.messages]

    assert asyncio.run(scene()) == [[], [Settled(estimate=CALL, actual=NOTHING)]]


def test_a_caller_that_gives_up_before_it_was_asked_for_reserves_nothing():
    async def scene():
        desk = Desk()
        gate = DeskGate(desk.serve)
        caller = asyncio.create_task(gate.enter(CALL))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await gate.flush()
        return sum(sizes(desk)), sum(len(settled) for _, settled, _ in desk.messages)

    asked, freed = asyncio.run(scene())
    assert asked == freed


def test_a_desk_that_is_gone_is_an_error_and_not_a_hang():
    async def gone(asks, settled, pause_s):
        raise ConnectionError("the actor\ndied")

    with pytest.raises(LLMError, match=r"^the desk .* failed: ConnectionError: the actor$"):
        asyncio.run(DeskGate(gone).enter(CALL))


def test_two_gates_share_the_budget_of_one_desk():
    async def scene():
        desk = TeacherDesk(TeacherConfig(budget=BudgetConfig(calls=5)), NOTHING)

        async def serve(*message):
            return desk.serve(*message)

        gates = [DeskGate(serve), DeskGate(serve)]
        results = await asyncio.gather(
            *(gate.enter(CALL) for gate in gates for _ in range(4)), return_exceptions=True
        )
        return sum(result is None for result in results)

    assert asyncio.run(scene()) == 5
