"""The rollout actor: clients that cannot be made, keys that are not told, what is not begun."""

import asyncio
import json
import logging
import pickle

import pytest
from jsonserver import JsonHandler, running

from step_ray.calls.desk import TeacherDesk
from step_ray.calls.spending import Spending
from step_ray.collection.runner import Address, EpisodePlan, EpisodeRunner
from step_ray.collection.teacher_config import BudgetConfig, Price, TeacherConfig
from step_ray.config import parse_config
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.errors import ConfigError
from step_ray.rollout import EpisodeSettings
from step_ray.types import Source


def test_without_the_teachers_key_no_episode_is_played_without_a_teacher(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    teacher = TeacherConfig(
        kind="llm", base_url="http://127.0.0.1:9/v1", model="m", api_key_env="NO_SUCH_KEY"
    )
    runner = EpisodeRunner(
        EpisodePlan(
            source=Source.SELF_REFLECTED,
            settings=EpisodeSettings(prompt="alfworld_short"),
            env="alfworld",
            teacher=teacher,
        )
    )
    task = {"task_id": "t", "env": "alfworld", "split": "train", "goal": "", "task_type": ""}
    row = {**task, "params": "{}", "seed": 0}

    async def play_twice():
        return [await runner(row), await runner(row)]

    records = [json.loads(answer["record"]) for answer in asyncio.run(play_twice())]

    assert [r["stop_reason"] for r in records] == ["env_error", "env_error"]
    assert all("'NO_SUCH_KEY' is not set" in r["error"] for r in records)


KEY = "sk-very-secret-0123456789"


class Echo(JsonHandler):
    """Answers every request with an error that repeats its Authorization header."""

    def do_POST(self):
        self.read()
        self.server.num_requests += 1
        words = f"no access with {self.headers['authorization']}"
        self.reply({"error": {"message": words}}, self.server.status)


def echoing(status):
    return running(Echo, status=status, num_requests=0)


@pytest.fixture
def game_row(tmp_path):
    spec = GeneratorSpec(seed=0, split="train", num_games=1, size="tiny")
    (game,) = generate_games(spec, tmp_path)
    return {
        **{"task_id": "t", "env": "alfworld", "split": "train", "goal": "", "task_type": ""},
        "params": json.dumps({"game": str(game)}),
        "seed": 0,
    }


@pytest.mark.parametrize(("who", "stop"), [("teacher", "teacher_error"), ("student", "llm_error")])
def test_a_key_that_the_endpoint_repeats_is_in_no_row_and_no_log(
    who, stop, game_row, tmp_path, monkeypatch, caplog, capfd
):
    monkeypatch.setenv("ECHO_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with echoing(401) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        teacher = TeacherConfig(kind="llm", base_url=url, model="m", api_key_env="ECHO_KEY")
        student = Address(base_url=url, model="m", api_key_env="ECHO_KEY")
        plan = EpisodePlan(
            source=Source.SELF_REFLECTED,
            settings=EpisodeSettings(prompt="alfworld_short"),
            env="alfworld",
            student=student if who == "student" else None,
            teacher=teacher if who == "teacher" else None,
            cache_dir=str(tmp_path / "cache"),
        )
        row = asyncio.run(EpisodeRunner(plan)(game_row))
        assert server.num_requests == 1
    record = json.loads(row["record"])
    assert record["stop_reason"] == stop
    assert "no access with Bearer <key>" in record["error"]
    out, err = capfd.readouterr()
    said = [row["record"], caplog.text, out, err, repr(pickle.dumps(plan))]
    assert not any(KEY in text for text in said)
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("value", "has_many_keys", "key"),
    [("a,b", False, "a,b"), ("a,b", True, "a"), (" , a , b", True, "a"), ("a", True, "a")],
)
def test_of_several_keys_the_first_is_sent(value, has_many_keys, key, monkeypatch):
    monkeypatch.setenv("KEYS", value)
    address = Address(base_url="u", model="m", api_key_env="KEYS", has_many_keys=has_many_keys)
    assert address.key() == key


@pytest.mark.parametrize("value", ["", " , "])
def test_a_variable_without_a_key_is_named(value, monkeypatch):
    monkeypatch.setenv("KEYS", value)
    address = Address(base_url="u", model="m", api_key_env="KEYS", has_many_keys=True)
    with pytest.raises(ConfigError, match=r"^api_key_env: 'KEYS' is not set on "):
        address.key()


class Handle:
    """A method of an actor."""

    def __init__(self, method):
        self.method = method

    async def remote(self, *arguments):
        return self.method(*arguments)


class LocalDesk:
    """A desk in this process, called as an actor is."""

    def __init__(self, desk):
        self.desk = desk
        self.serve, self.start, self.end = map(Handle, (desk.serve, desk.start, desk.end))


def play_with_desk(game_row, spent, **budget):
    teacher = TeacherConfig(budget=BudgetConfig(**budget))
    desk = TeacherDesk(teacher, Spending(calls=spent))
    plan = EpisodePlan(
        source=Source.SELF_REFLECTED,
        settings=EpisodeSettings(prompt="alfworld_short"),
        env="alfworld",
        teacher=teacher,
    )
    row = asyncio.run(EpisodeRunner(plan, LocalDesk(desk))(game_row))
    return row, desk.close().calls - spent


def test_an_episode_that_the_budget_does_not_let_begin_has_no_record(game_row):
    row, paid = play_with_desk(game_row, spent=9, calls=9)
    assert (row, paid) == (
        {"trajectory_id": "t#self_reflected#0", "record": "", "refusal": ""},
        0,
    )


def test_an_episode_in_flight_is_ended_by_the_budget_and_keeps_its_steps(game_row):
    row, paid = play_with_desk(game_row, spent=0, calls=2)
    record = json.loads(row["record"])
    assert (record["stop_reason"], paid) == ("budget", 2)
    assert record["error"] == "teacher.budget.calls: all 2 are spent or reserved"
    assert [step["kind"] for step in record["steps"]] == ["act", "act", "unjudged"]
    assert record["usage"]["teacher_calls"] == 2


def test_an_episode_in_flight_may_finish_over_the_budget(game_row):
    row, paid = play_with_desk(game_row, spent=0, calls=2, at_limit="finish")
    assert json.loads(row["record"])["stop_reason"] == "success"
    assert paid > 2


class Looks(JsonHandler):
    """A student that looks around, and charges 100 prompt tokens for it."""

    def do_POST(self):
        self.read()
        message = {"role": "assistant", "content": "Thought: I look.\nAction: look"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.reply({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


def test_a_student_with_a_price_is_paid_from_the_budget_too(game_row):
    teacher = TeacherConfig(budget=BudgetConfig(money=3))
    desk = TeacherDesk(teacher, Spending())
    with running(Looks) as server:
        plan = EpisodePlan(
            source=Source.SELF_REFLECTED,
            settings=EpisodeSettings(prompt="alfworld_short"),
            env="alfworld",
            student=Address(base_url=f"http://127.0.0.1:{server.server_port}/v1", model="m"),
            teacher=teacher,
            prices={"m": Price(prompt=10_000, completion=0)},
        )
        row = asyncio.run(EpisodeRunner(plan, LocalDesk(desk))(game_row))
    record = json.loads(row["record"])
    assert record["error"] == "teacher.budget.money: all 3.0 are spent or reserved"
    assert (record["usage"]["student_calls"], record["usage"]["student_cost"]) == (3, 3.0)
    assert desk.close() == Spending(calls=2, money=3.0)


def test_an_episode_that_many_actors_died_of_is_an_error_and_not_played(game_row):
    desk = TeacherDesk(TeacherConfig(), Spending(), max_starts=1)
    plan = EpisodePlan(
        source=Source.EXPERT,
        settings=EpisodeSettings(prompt="alfworld_short"),
        env="alfworld",
        max_starts=1,
    )
    first = asyncio.run(EpisodeRunner(plan, LocalDesk(desk))(game_row))
    assert json.loads(first["record"])["stop_reason"] == "success"
    desk.start("t#expert#0")  # by an actor that died
    row = json.loads(asyncio.run(EpisodeRunner(plan, LocalDesk(desk))(game_row))["record"])
    assert (row["stop_reason"], row["steps"]) == ("env_error", [])
    assert row["error"] == "collect.max_starts: 1 actors died while playing it"


# Whose the episodes are


def identity(**sections):
    teacher = {
        "kind": "llm",
        "base_url": "http://a/v1",
        "model": "m",
        **sections.pop("teacher", {}),
    }
    config = parse_config({"name": "r", "teacher": teacher, **sections})
    student = Address(base_url="http://s/v1", model="base")
    plan = EpisodePlan.from_config(
        config, Source.SELF_REFLECTED, student=student, teacher=config.teacher
    )
    return plan.identity()


@pytest.mark.parametrize(
    "sections",
    [
        {"teacher": {"base_url": "http://b/v1", "api_key_env": "K", "budget": {"calls": 5}}},
        {"collect": {"num_actors": 7, "step_timeout_s": 5, "max_errors": 3}},
        {"name": "other"},
    ],
)
def test_where_and_how_fast_is_no_part_of_the_identity(sections):
    assert identity(**sections) == identity()


@pytest.mark.parametrize(
    "sections",
    [
        {"teacher": {"model": "n"}},
        {"teacher": {"when": "before_execution"}},
        {"collect": {"max_new_tokens": 9}},
        {"env": {"max_steps": 9}},
        {"seed": 1},
    ],
)
def test_who_plays_what_and_how_is_the_identity(sections):
    assert identity(**sections) != identity()
