"""The desk: who starts when, what is refused, what is kept on disk; the clock is a number."""

import json

import pytest

from step_ray.calls.desk import HORIZON_S, Start, TeacherDesk, read_ledger, write_ledger
from step_ray.calls.gate import Ask, Settled
from step_ray.calls.spending import NOTHING, Spending
from step_ray.collection.teacher_config import BudgetConfig, TeacherConfig
from step_ray.errors import DataError

CALL = Spending(calls=1, tokens=100, money=0.5)
ASK = Ask(estimate=CALL)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make_desk(spent=NOTHING, ledger=None, clock=None, budget=None, **rates):
    config = TeacherConfig(budget=BudgetConfig(**budget or {}), **rates)
    return TeacherDesk(config, spent, ledger, clock or Clock())


def ended(actual, estimate=CALL):
    return Settled(estimate=estimate, actual=actual)


# Rates


def test_turns_are_given_in_order_as_far_as_the_horizon():
    desk = make_desk(requests_per_minute=60)
    answer = desk.serve([ASK] * 5, [], 0.0)
    assert (answer.turns, answer.nap_s) == ((0.0, 1.0, 2.0), 3.0 - HORIZON_S)


def test_a_turn_that_is_not_given_is_not_taken():
    clock = Clock()
    desk = make_desk(requests_per_minute=60, clock=clock)
    desk.serve([ASK] * 5, [], 0.0)
    clock.now = 3.0
    assert desk.serve([ASK], [], 0.0).turns == (0.0,)


def test_tokens_are_reserved_by_the_estimate_and_corrected_by_what_came():
    desk = make_desk(tokens_per_minute=6000)  # 100 a second
    assert desk.serve([ASK, ASK], [], 0.0).turns == (0.0, 1.0)
    # the first had 10 tokens instead of 100
    assert desk.serve([ASK], [ended(Spending(calls=1, tokens=10))], 0.0).turns == (
        pytest.approx(1.1),
    )


def test_a_retry_counts_as_a_request_and_not_as_a_call():
    desk = make_desk(requests_per_minute=60, budget={"calls": 1})
    retry = Ask(estimate=CALL, again=True)
    assert desk.serve([ASK, retry, retry], [], 0.0).turns == (0.0, 1.0, 2.0)


def test_what_one_actor_is_told_to_wait_holds_for_all():
    clock = Clock()
    desk = make_desk(requests_per_minute=6000, clock=clock)
    desk.serve([], [], 10.0)
    answer = desk.serve([ASK], [], 0.0)
    assert (answer.turns, answer.nap_s) == ((), 10.0 - HORIZON_S)
    clock.now = 10.0
    assert desk.serve([ASK], [], 0.0).turns == (0.0,)


# Budgets


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ({"calls": 2}, "teacher.budget.calls: all 2 are spent or reserved"),
        ({"tokens": 250}, "teacher.budget.tokens: all 250 are spent or reserved"),
        ({"money": 1.25}, "teacher.budget.money: all 1.25 are spent or reserved"),
        ({"tokens": 1_000_000, "calls": 2}, "teacher.budget.calls: all 2 are spent or reserved"),
    ],
)
def test_a_call_that_does_not_fit_is_refused_with_the_limit(budget, line):
    desk = make_desk(budget=budget)
    assert desk.serve([ASK] * 4, [], 0.0).turns == (0.0, 0.0, line, line)


def test_what_a_call_did_not_need_is_there_for_others():
    desk = make_desk(budget={"tokens": 200})
    assert desk.serve([ASK, ASK], [], 0.0).turns == (0.0, 0.0)
    few = ended(Spending(calls=1, tokens=20))
    assert desk.serve([], [few, few], 0.0).turns == ()
    assert desk.serve([ASK], [], 0.0).turns == (0.0,)  # 40 spent, 100 fit
    assert isinstance(desk.serve([ASK], [], 0.0).turns[0], str)  # 140 and 100 do not


def test_a_call_without_an_answer_costs_nothing():
    desk = make_desk(budget={"calls": 1})
    for _ in range(3):
        assert desk.serve([ASK], [], 0.0).turns == (0.0,)
        desk.serve([], [ended(NOTHING)], 0.0)
    assert desk.close() == NOTHING


def test_a_restarted_desk_is_not_owed_what_was_reserved_before_it():
    desk = make_desk(budget={"calls": 2})
    desk.serve([], [ended(Spending(calls=1))], 0.0)  # reserved with the desk that died
    assert isinstance(desk.serve([ASK, ASK], [], 0.0).turns[1], str)


def test_what_was_spent_before_counts():
    desk = make_desk(spent=Spending(calls=7), budget={"calls": 8})
    assert desk.start("t") is Start.GO
    assert desk.serve([ASK], [], 0.0).turns == (0.0,)
    assert desk.start("t") is Start.BUDGET


def test_in_flight_episodes_may_finish_while_none_begins():
    desk = make_desk(spent=Spending(calls=8), budget={"calls": 8, "at_limit": "finish"})
    assert desk.start("t") is Start.BUDGET
    assert desk.serve([ASK] * 3, [], 0.0).turns == (0.0,) * 3


def test_without_a_budget_everything_may_start():
    desk = make_desk(spent=Spending(calls=10**9, tokens=10**9, money=1e9))
    assert desk.start("t") is Start.GO
    assert desk.serve([ASK], [], 0.0).turns == (0.0,)


# The ledger


def test_the_ledger_is_written_at_most_once_a_second_and_at_the_end(tmp_path):
    clock, path = Clock(), tmp_path / "ledger.json"
    desk = make_desk(ledger=path, clock=clock)
    desk.serve([ASK, ASK], [], 0.0)
    desk.serve([], [ended(CALL)], 0.0)
    assert not path.exists()
    clock.now = 1.0
    desk.serve([], [], 0.0)
    assert read_ledger(path) == CALL
    desk.serve([], [ended(CALL)], 0.0)
    assert read_ledger(path) == CALL
    assert desk.close() == read_ledger(path) == CALL + CALL


def test_a_desk_that_starts_again_goes_on_from_its_ledger(tmp_path):
    path = tmp_path / "ledger.json"
    write_ledger(path, Spending(calls=5, tokens=10, money=0.25))
    desk = make_desk(spent=Spending(calls=3, tokens=20), ledger=path, budget={"calls": 5})
    assert desk.start("t") is Start.BUDGET
    assert desk.close() == Spending(calls=5, tokens=20, money=0.25)


@pytest.mark.parametrize("content", ["{", "[]", '{"calls": 1}', '{"calls": "x"}'])
def test_a_file_that_is_no_ledger_is_named(tmp_path, content):
    path = tmp_path / "ledger.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"ledger\.json"):
        read_ledger(path)


def test_no_ledger_is_nothing_spent_and_it_is_plain_json(tmp_path):
    path = tmp_path / "ledger.json"
    assert read_ledger(path) == NOTHING
    write_ledger(path, CALL)
    assert json.loads(path.read_text()) == {"calls": 1, "tokens": 100, "money": 0.5}


# Starts


def test_an_episode_that_takes_its_actor_along_too_often_is_not_begun_again():
    desk = TeacherDesk(TeacherConfig(), NOTHING, max_starts=3)
    assert [desk.start("t") for _ in range(4)] == [Start.GO, Start.GO, Start.GO, Start.FATAL]
    assert (desk.start("other"), desk.num_starts()) == (Start.GO, 4)


def test_an_episode_that_ended_is_forgotten():
    desk = TeacherDesk(TeacherConfig(), NOTHING, max_starts=1)
    for _ in range(2):
        assert desk.start("t") is Start.GO
        desk.end("t")
    assert desk.num_starts() == 2
