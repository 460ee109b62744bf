"""A collection survives a bad endpoint, and the death of an actor, a node and its own driver."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fault_driver import CONCURRENCY, ROWS_PER_SHARD, make_plan, rollout_actors
from faulty_endpoint import TRY_TIMEOUT_S, FaultyEndpoint
from rich.console import Console
from test_collect import ids, on_disk

from step_ray.collect import run_episodes
from step_ray.collection.listplay import shown_episodes
from step_ray.collection.teacher_config import Price
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.errors import EpisodesError
from step_ray.progress import Reporter
from step_ray.store import Outcome, read_trajectories
from step_ray.tasks import write_tasks
from step_ray.types import ERROR_STOPS, Source, StopReason, Task

HERE = Path(__file__).resolve().parent
NUM_GAMES = 20
LATENCY_S = 0.3
GRACE_S = 30.0
"""For a busy machine: what should be over may be over so much later."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    spec = GeneratorSpec(seed=0, split="train", num_games=NUM_GAMES, size="tiny")
    return generate_games(spec, tmp_path_factory.mktemp("games"))


def make_tasks(games, number):
    return [
        Task(
            task_id=f"alfworld/train/{i}",
            **{"env": "alfworld", "split": "train", "goal": ""},
            params={"game": str(games[i % len(games)])},
        )
        for i in range(number)
    ]


def wanted(tasks):
    return ids(tasks, source=Source.SELF_REFLECTED)


def session(outcome):
    """The name of an episode at its endpoints: task and seed."""
    task, _, seed = outcome.trajectory_id.rsplit("#", 2)
    return f"{task}#{seed}"


def test_every_task_ends_in_one_row_when_three_calls_of_ten_go_wrong(ray_cluster, games, tmp_path):
    tasks, leaks = make_tasks(games, 500), []
    with FaultyEndpoint(share=0.3) as endpoint:
        plan = make_plan(endpoint.url, TRY_TIMEOUT_S, episodes_per_actor=64, max_error_share=0.2)

        def on_episode(outcome):
            if not endpoint.nobody_waits(session(outcome), within_s=5.0):
                leaks.append(outcome.trajectory_id)

        summary = run_episodes(tasks, plan, tmp_path, on_episode=on_episode)
        print(f"\nfaults {dict(endpoint.faults)} in {endpoint.calls.total()} calls", end=" ")
        print(f"retries {summary.retries} stops {summary.stop_reasons}")
        assert on_disk(tmp_path) == Counter(wanted(tasks))
        assert leaks == []
        assert set(endpoint.faults) == set(FaultyEndpoint.FAULTS)
        assert endpoint.faults.total() > 0.25 * endpoint.calls.total() > 400
        assert max(endpoint.seconds) < TRY_TIMEOUT_S + GRACE_S
        assert (summary.num_restarts, len(endpoint.begun)) == (0, 500)
    played = read_trajectories(tmp_path)
    assert all(t.error for t in played if t.stop_reason in ERROR_STOPS)
    assert summary.num_errors < 25  # a call has six tries


def test_an_episode_whose_calls_all_hang_ends_by_its_own_time_limit(ray_cluster, games, tmp_path):
    tasks = make_tasks(games, 4)
    with FaultyEndpoint(share=1.0, faults=("hang",)) as endpoint:
        plan = make_plan(endpoint.url, TRY_TIMEOUT_S, max_error_share=0.99)
        plan = replace(plan, settings=replace(plan.settings, episode_timeout_s=6.0))
        left = []

        def on_episode(outcome):
            left.append(endpoint.nobody_waits(session(outcome), within_s=5.0))

        with pytest.raises(EpisodesError, match="timeout 4"):
            run_episodes(tasks, plan, tmp_path, on_episode=on_episode)
        assert left == [True] * 4
    assert {t.stop_reason for t in read_trajectories(tmp_path)} == {StopReason.TIMEOUT}


def scraped():
    """The series of step_ray that Prometheus would find on the driver's node: name -> value."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=30) as page:
        lines = page.read().decode().splitlines()
    series = [
        line for line in lines if line.startswith("ray_step_ray_") and 'stage="taught"' in line
    ]
    return {
        re.split(r"[{ ]", line)[0]: float(line.rsplit(" ", 1)[1])
        for line in series
        if 'role="student"' not in line
    }


def test_progress_is_in_plain_lines_and_in_ray_metrics(ray_cluster, games, tmp_path):
    tasks, out = make_tasks(games, 12), io.StringIO()
    with (
        FaultyEndpoint() as endpoint,
        shown_episodes(Reporter(Console(file=out, width=300)), "taught", 12) as shown,
    ):
        plan = make_plan(endpoint.url, prices={"teacher": Price(prompt=1e4, completion=0)})
        run_episodes(tasks, plan, tmp_path, on_episode=shown.add, on_begin=shown.begin)
    played = read_trajectories(tmp_path)
    calls = sum(t.usage.teacher_calls for t in played)
    last = out.getvalue().splitlines()[-1]
    corrections = sum(Outcome.of(t).num_corrections for t in played)
    assert re.search(
        rf"taught 12/12 0 won, 0 failed, {corrections / 12:.1f} corrections each, [\d,]+ tokens/s,"
        rf" cost {calls:,}\.00$",
        last,
    )
    wanted = {
        "ray_step_ray_episodes_total": 12,
        "ray_step_ray_corrections_total": corrections,
        "ray_step_ray_cost_total": calls,
        "ray_step_ray_episodes_done": 12,
    }
    deadline = time.monotonic() + 90
    while not wanted.items() <= scraped().items():
        assert time.monotonic() < deadline, scraped()
        time.sleep(1)


def test_a_killed_actor_costs_what_it_had_under_way(ray_cluster, games, tmp_path):
    tasks, killed = make_tasks(games, 80), []
    with FaultyEndpoint(latency_s=LATENCY_S) as endpoint:

        def on_episode(outcome):
            killed.append(0)
            if len(killed) == 20:
                pid, _ = rollout_actors()[0]
                os.kill(pid, signal.SIGKILL)

        summary = run_episodes(tasks, make_plan(endpoint.url), tmp_path, on_episode=on_episode)
        print(f"\nredone {endpoint.redone} of 80, restarts {summary.num_restarts}")
        assert on_disk(tmp_path) == Counter(wanted(tasks))
        assert 1 <= endpoint.redone <= CONCURRENCY
        assert endpoint.redone <= summary.num_restarts <= CONCURRENCY
        assert summary.num_errors == 0


def driver(kind, endpoint, tasks, tmp_path):
    manifest = tmp_path / "tasks.parquet"
    write_tasks(manifest, tasks)
    script = [sys.executable, str(HERE / "fault_driver.py"), kind, endpoint.url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), *sys.path])}
    return subprocess.Popen(
        [*script, str(manifest), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_killed_driver_costs_a_shard_and_what_was_under_way(ray_cluster, games, tmp_path):
    tasks, out = make_tasks(games, 60), tmp_path / "out"
    with FaultyEndpoint(latency_s=LATENCY_S) as endpoint:
        with driver("alone", endpoint, tasks, tmp_path) as process:
            for _ in range(20):
                assert process.stdout.readline()
            process.kill()
        survived = on_disk(out)
        assert set(survived.values()) == {1}
        assert survived.total() >= 20 - ROWS_PER_SHARD
        summary = run_episodes(tasks, make_plan(endpoint.url), out)
        print(f"\nredone {endpoint.redone} of 60, resumed {summary.num_resumed}")
        assert on_disk(out) == Counter(wanted(tasks))
        assert summary.num_resumed == survived.total()
        # under way in two actors, ended and not yet in a shard, and what actors begin before they
        # notice that they are alone
        assert endpoint.redone <= 3 * CONCURRENCY + ROWS_PER_SHARD


def play_elsewhere(kind, endpoint, tasks, tmp_path):
    """What a driver of its own tells at its end."""
    with driver(kind, endpoint, tasks, tmp_path) as process:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0
    return next(json.loads(x) for x in output.splitlines()[::-1] if x.startswith("{"))


def test_a_lost_node_costs_what_it_had_under_way(games, tmp_path):
    tasks, out = make_tasks(games, 80), tmp_path / "out"
    with FaultyEndpoint(latency_s=LATENCY_S) as endpoint:
        summary = play_elsewhere("nodes", endpoint, tasks, tmp_path)
        print(f"\nredone {endpoint.redone} of 80, restarts {summary['num_restarts']}")
        assert on_disk(out) == Counter(wanted(tasks))
        assert summary["removed"] == 1
        assert 1 <= endpoint.redone <= 3 * CONCURRENCY  # both actors may have been there
        assert summary["num_errors"] == 0


def test_a_drained_node_costs_nothing_when_its_episodes_can_end(games, tmp_path):
    tasks, out = make_tasks(games, 80), tmp_path / "out"
    with FaultyEndpoint(latency_s=LATENCY_S) as endpoint:
        summary = play_elsewhere("leave", endpoint, tasks, tmp_path)
        print(f"\nredone {endpoint.redone} of 80, restarts {summary['num_restarts']}")
        assert on_disk(out) == Counter(wanted(tasks))
        assert summary["removed"] == 1
        assert endpoint.redone <= CONCURRENCY  # 0 unless the machine is too busy for 15 s
        assert summary["num_errors"] == 0


def test_nodes_that_join_take_episodes_without_a_restart(games, tmp_path):
    tasks, out = make_tasks(games, 240), tmp_path / "out"
    with FaultyEndpoint(latency_s=LATENCY_S) as endpoint:
        summary = play_elsewhere("grow", endpoint, tasks, tmp_path)
    print(f"\nepisodes by node before {summary['before']}, after {summary['after']}", end=" ")
    print(f"first of a new node after {summary['waited_s']:.1f} s;", end=" ")
    print(f"{summary['rate_before']:.1f} and {summary['rate_after']:.1f} episodes/s")
    assert on_disk(out) == Counter(wanted(tasks))
    assert summary["before"].keys() == {"student-a"}
    assert summary["after"].keys() == {"student-a", "student-b", "student-c"}
    assert (summary["num_restarts"], summary["num_errors"]) == (0, 0)
