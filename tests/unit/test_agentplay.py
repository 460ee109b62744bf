"""Episodes that the served agent plays itself: each comes once, whatever breaks off in between."""

import json
import threading
import time
from contextlib import contextmanager

import pytest
from builders import make_evaluated, make_task
from jsonserver import JsonHandler, running

from step_ray.collection import agentplay
from step_ray.collection.agentplay import AgentPlayer
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.errors import EpisodesError
from step_ray.rollout import EpisodeSettings
from step_ray.storage.records import to_row
from step_ray.types import Source, StopReason

KEY = "sk-secret"
BREAK, HANG = object(), object()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(agentplay, "LONGEST_WAIT_S", 0.01)


class Agent(JsonHandler):
    """Plays what it is asked for, or does what its script says of this request.

    A tuple: status, headers, body. BREAK: half a line. HANG: nothing until the client goes.
    """

    def do_POST(self):
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(0.05)
        with server.lock:
            server.now -= 1
        self.play()

    def play(self):
        asked = self.read()
        self.server.asked.append(asked)
        number = len(self.server.asked) - 1
        assert self.path == "/v1/episodes"
        assert self.headers["authorization"] == f"Bearer {KEY}"
        act = self.server.script[number] if number < len(self.server.script) else None
        if act is HANG:
            self.server.arrived.set()
            assert self.connection.recv(1) == b""
            self.server.left.set()
        elif isinstance(act, tuple):
            self.answer(act[0], act[1], json.dumps(act[2]))
        else:
            self.answer(200, {"content-length": "100000"} if act is BREAK else {}, episode(asked))

    def answer(self, status, headers, text):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())


def episode(asked):
    """The lines that a replica sends; its task is another one than the run's."""
    (name,) = asked["ids"]
    played = make_evaluated(name, "a desk", seed=asked["seed"], task_type="the replica's own")
    record = {"object": "episode", "task_id": name, "error": None, "trajectory": to_row(played)}
    return f'{json.dumps(record)}\n{{"object": "episodes.report"}}\n'


@contextmanager
def agent(*script, monkeypatch, at_once=1):
    """A player of a served agent that does so, and the server."""
    monkeypatch.setenv("AGENT_KEY", KEY)
    events = {"arrived": threading.Event(), "left": threading.Event()}
    counts = {"lock": threading.Lock(), "now": 0, "most": 0}
    with running(Agent, script=script, asked=[], **events, **counts) as server:
        plan = EpisodePlan(
            source=Source.STUDENT,
            settings=EpisodeSettings(prompt="alfworld_short", max_new_tokens=48),
            env="toy",
            student=Address(base_url=server.url, model="step", api_key_env="AGENT_KEY"),
            episodes_per_actor=at_once,
        )
        yield AgentPlayer(plan), server


def pairs(*names, split="seen", seed=0):
    return [(make_task(name, split=split, goal="ours"), seed) for name in names]


def ids(ended):
    return sorted(trajectory.trajectory_id for trajectory, _ in ended)


def test_each_episode_comes_once_with_the_task_of_the_run(monkeypatch):
    with agent(monkeypatch=monkeypatch) as (player, server):
        ended = list(player.play(pairs("a") + pairs("a", split="unseen", seed=7)))
    assert ids(ended) == ["a#student#0", "a#student#7"]
    assert {(t.task.goal, t.task.task_type, refusal) for t, refusal in ended} == {("ours", "", "")}
    fields = {"environment": "toy", "ids": ["a"], "model": "step"}
    fields |= {"temperature": 0.0, "max_tokens": 48}
    assert server.asked == [
        {**fields, "split": "seen", "seed": 0},
        {**fields, "split": "unseen", "seed": 7},
    ]
    assert player.num_restarts == 0


def test_so_many_are_under_way_as_asked_for(monkeypatch):
    names = [f"t{n}" for n in range(12)]
    with agent(monkeypatch=monkeypatch, at_once=3) as (player, server):
        assert len(ids(player.play(pairs(*names)))) == 12
    assert server.most == 3


@pytest.mark.parametrize(
    ("passing", "num_begun_again"),
    [
        ((429, {"retry-after": "0"}, {"error": {"message": "no room"}}), 0),
        ((503, {}, "Service Unavailable"), 0),
        ((200, {}, {"error": {"message": "internal error: KeyError"}}), 1),
        ((200, {}, {"object": "episode"}), 1),
        ((200, {}, "a page"), 1),
        ((200, {}, [1]), 1),
        (BREAK, 1),
    ],
)
def test_what_passes_is_asked_again(monkeypatch, passing, num_begun_again):
    with agent(passing, monkeypatch=monkeypatch) as (player, server):
        assert ids(player.play(pairs("a"))) == ["a#student#0"]
    assert (len(server.asked), player.num_restarts) == (2, num_begun_again)


def test_a_refusal_is_one_line_without_the_key(monkeypatch):
    refusal = 400, {}, {"error": {"message": f"ids: unknown to {KEY}"}}
    refused = pytest.raises(EpisodesError)
    with agent(refusal, monkeypatch=monkeypatch) as (player, server), refused as caught:
        list(player.play(pairs("a", "b")))
    assert str(caught.value) == (
        f"evaluate.where: the agent at {server.url} does not play: HTTP 400: ids: unknown to <key>;"
        " what has ended is kept"
    )
    assert len(server.asked) == 1


def test_an_agent_that_stays_busy_is_given_up(monkeypatch):
    monkeypatch.setattr(agentplay, "PATIENCE_S", 0.2)
    busy = 503, {}, {"error": {"message": "loading"}}
    given_up = pytest.raises(EpisodesError, match=r"gave up after 0\.2 s: HTTP 503: loading")
    with agent(*[busy] * 99, monkeypatch=monkeypatch) as (player, server), given_up:
        list(player.play(pairs("a")))
    assert len(server.asked) > 1


def test_an_agent_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(agentplay, "PATIENCE_S", 0.2)
    with agent(monkeypatch=monkeypatch) as (player, _):
        pass
    with pytest.raises(EpisodesError, match=r"gave up after 0\.2 s: ConnectError"):
        list(player.play(pairs("a")))


def test_an_episode_that_breaks_off_each_time_is_a_row_and_the_others_go_on(monkeypatch):
    with agent(*[BREAK] * 5, monkeypatch=monkeypatch) as (player, server):
        (bad, _), (good, _) = player.play(pairs("a", "b"))
    assert (bad.trajectory_id, bad.stop_reason) == ("a#student#0", StopReason.ENV_ERROR)
    assert bad.error.startswith("begun 5 times (collect.max_starts): RemoteProtocolError: ")
    assert (good.trajectory_id, good.error) == ("b#student#0", None)
    assert (len(server.asked), player.num_restarts) == (6, 4)


def test_a_key_that_no_header_can_hold_is_an_error_without_it(monkeypatch):
    with agent(monkeypatch=monkeypatch) as (player, _):
        player._key = "schlüssel"
        with pytest.raises(EpisodesError, match="does not play: UnicodeEncodeError") as caught:
            list(player.play(pairs("a")))
    assert "schlüssel" not in str(caught.value)


def test_what_came_before_a_refusal_is_not_lost(monkeypatch):
    refusal = 401, {}, {"error": {"message": "wrong or missing API key"}}
    came = []
    refused = pytest.raises(EpisodesError, match="HTTP 401: wrong or missing API key")
    with agent(None, refusal, monkeypatch=monkeypatch) as (player, _), refused:
        came.extend(ids([ended])[0] for ended in player.play(pairs("a", "b")))
    assert came == ["a#student#0"]


def test_leaving_ends_what_is_under_way(monkeypatch):
    with agent(None, HANG, monkeypatch=monkeypatch, at_once=2) as (player, server):
        ended = player.play(pairs("a", "b"))
        next(ended)
        server.arrived.wait(10)
        ended.close()
        assert server.left.wait(10)
