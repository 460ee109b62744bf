"""Episodes on Ray Data: every id once, errors are rows, budgets hold, kills lose nothing."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jsonserver import JsonHandler, running

from step_ray.collect import run_episodes
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.collection.teacher_config import BudgetConfig, Price, TeacherConfig
from step_ray.envs.alfworld.generator import GeneratorSpec, generate_games
from step_ray.errors import DataError, EndpointError, EpisodesError, RunStateError
from step_ray.rollout import EpisodeSettings, trajectory_id
from step_ray.store import read_rows, read_trajectories, total_usage
from step_ray.tasks import read_tasks, write_tasks
from step_ray.types import Source, StopReason, Task

ROOT = Path(__file__).resolve().parents[2]
PLAN = EpisodePlan(
    source=Source.EXPERT,
    settings=EpisodeSettings(prompt="alfworld_short"),
    env="alfworld",
    num_actors=1,
    episodes_per_actor=2,
    rows_per_shard=1,
)
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Six games, one of each type."""
    spec = GeneratorSpec(seed=0, split="train", num_games=6, size="tiny")
    return [
        Task(
            task_id=f"alfworld/train/{number}",
            env="alfworld",
            split="train",
            goal="",
            task_type=path.parents[1].name.partition("-")[0],
            params={"game": str(path)},
        )
        for number, path in enumerate(generate_games(spec, tmp_path_factory.mktemp("games")))
    ]


def ids(tasks, seeds=(0,), source=Source.EXPERT):
    return sorted(trajectory_id(task.task_id, source, seed) for task in tasks for seed in seeds)


def on_disk(folder):
    """How often each id is in the shards, whatever readers make of it."""
    shards = [p for p in folder.glob("*.parquet") if not p.name.startswith(".")]
    return Counter(
        row for shard in shards for row in pq.read_table(shard)["trajectory_id"].to_pylist()
    )


@pytest.fixture(scope="module")
def golden(ray_cluster, tasks, tmp_path_factory):
    """Every game once per seed: folder, summary and what was reported on the way."""
    folder, seen = tmp_path_factory.mktemp("golden"), []
    summary = run_episodes(tasks, PLAN, folder, seeds=(0, 1), on_episode=seen.append)
    return folder, summary, seen


def test_the_expert_wins_every_game_once_per_seed(golden, tasks):
    folder, summary, seen = golden
    assert on_disk(folder) == Counter(ids(tasks, seeds=(0, 1)))
    assert sorted(t.trajectory_id for t in seen) == ids(tasks, seeds=(0, 1))
    assert (summary.num_episodes, summary.num_success, summary.num_resumed) == (12, 12, 0)
    assert (summary.num_errors, summary.stop_reasons) == (0, {"success": 12})
    assert (summary.teacher_calls, summary.retries) == (0, 0)
    trajectories = read_trajectories(folder)
    assert summary.num_steps == sum(len(t.steps) for t in trajectories)
    assert {t.task.task_id: t.task for t in trajectories} == {t.task_id: t for t in tasks}
    assert {t.engine for t in trajectories} == {"alfworld/native"}


def test_a_second_start_plays_only_what_is_missing(golden, tasks, tmp_path):
    folder = shutil.copytree(golden[0], tmp_path / "copy")
    lost, *kept = sorted(folder.glob("*.parquet"))
    missing = pq.read_table(lost)["trajectory_id"].to_pylist()
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    seen = []
    summary = run_episodes(tasks, PLAN, folder, seeds=(0, 1), on_episode=seen.append)
    assert on_disk(folder) == Counter(ids(tasks, seeds=(0, 1)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pending = read_rows(folder / "manifest" / "pending.parquet")
    assert [f"{row['task_id']}#expert#{row['seed']}" for row in pending] == missing
    assert (summary.num_episodes, summary.num_resumed, len(seen)) == (12, 11, 12)


def test_where_nothing_is_missing_nothing_is_written(golden, tasks, tmp_path):
    folder = shutil.copytree(golden[0], tmp_path / "copy")
    before = sorted(folder.rglob("*"))
    summary = run_episodes(tasks[:3], PLAN, folder)
    assert (summary.num_episodes, summary.num_resumed) == (3, 3)
    assert sorted(folder.rglob("*")) == before


def test_an_error_is_a_row_and_is_played_again_on_request(tasks, tmp_path):
    whole, game = Path(tasks[0].params["game"]), tmp_path / "game.tw-pddl"
    game.write_text(whole.read_text()[:500])
    broken = replace(tasks[0], params={"game": str(game)})
    mixed, out = [broken, *tasks[1:3]], tmp_path / "out"
    summary = run_episodes(mixed, replace(PLAN, max_error_share=0.34), out)
    assert (summary.num_errors, summary.num_success) == (1, 2)
    (error,) = [t for t in read_trajectories(out) if t.stop_reason is StopReason.ENV_ERROR]
    assert error.task == broken
    assert f"{game}: not a readable game file" in error.error

    shutil.copy(whole, game)
    tolerant = replace(PLAN, max_error_share=0.34)
    assert run_episodes(mixed, tolerant, out).num_errors == 1
    assert on_disk(out) == Counter(ids(mixed))
    with pytest.raises(EpisodesError, match=r"^1 of 3 episodes .* with --retry-errors"):
        run_episodes(mixed, PLAN, out)
    summary = run_episodes(mixed, replace(PLAN, retry_errors=True), out)
    assert (summary.num_errors, summary.num_success, summary.num_resumed) == (0, 3, 2)
    assert [t.trajectory_id for t in read_trajectories(out)] == ids(mixed)


@pytest.mark.slow
def test_too_many_errors_of_the_whole_list_fail_and_only_they_are_played_again(tasks, tmp_path):
    out, game = tmp_path / "out", tmp_path / "game.tw-pddl"
    run_episodes(tasks[:3], PLAN, out)
    broken = [replace(task, params={"game": str(game)}) for task in tasks[3:5]]
    mixed, plan = [*tasks[:3], *broken], replace(PLAN, max_error_share=0.3)
    with pytest.raises(EpisodesError) as caught:
        run_episodes(mixed, plan, out)
    assert str(caught.value) == (
        "2 of 5 episodes ended by an error (env_error 2), more than collect.max_error_share 0.3"
        " allows; with --retry-errors (collect.retry_errors) the same command plays these again"
        f" (first: alfworld/train/3#expert#0: alfworld/train/3: the game file '{game}' is missing)"
    )
    assert on_disk(out) == Counter(ids(mixed))

    shutil.copy(tasks[0].params["game"], game)
    summary = run_episodes(mixed, replace(plan, retry_errors=True), out)
    assert (summary.num_success, summary.num_errors, summary.num_resumed) == (5, 0, 3)
    assert on_disk(out) == Counter(ids(mixed)) + Counter(ids(broken))
    assert [t.trajectory_id for t in read_trajectories(out)] == ids(mixed)


def test_a_stage_in_which_every_episode_fails_is_an_error_that_quotes_the_first(tasks, tmp_path):
    nobody = Address(base_url="http://127.0.0.1:9/v1", model="m")
    plan = replace(
        PLAN,
        source=Source.STUDENT,
        student=nobody,
        settings=replace(PLAN.settings, step_timeout_s=0.01),
    )
    with pytest.raises(
        EpisodesError, match=r"^2 of 2 episodes .*\(llm_error 2\).* \(first: .*: student m: Time"
    ):
        run_episodes(tasks[:2], plan, tmp_path)
    assert on_disk(tmp_path) == Counter(ids(tasks[:2], source=Source.STUDENT))


@pytest.mark.slow
def test_a_stage_that_goes_wrong_stops_early_and_keeps_what_has_ended(tasks, tmp_path):
    many = [replace(task, task_id=f"{task.task_id}-{i}") for task in tasks for i in range(20)]
    nobody = Address(base_url="http://127.0.0.1:9/v1", model="m")
    short = replace(PLAN.settings, step_timeout_s=0.01)
    plan = replace(PLAN, source=Source.STUDENT, student=nobody, settings=short)
    with pytest.raises(
        EpisodesError, match=r"^stopped, what has ended is kept: 10 of the first 10"
    ):
        run_episodes(many, replace(plan, max_error_share=0.2, errors_judged_after=10), tmp_path)
    assert on_disk(tmp_path).total() == 10
    # what is missing is played, and that too goes wrong
    with pytest.raises(EpisodesError, match=r"^stopped, .*: 12 of 120 .* collect\.max_errors 11"):
        run_episodes(many, replace(plan, max_error_share=0.2, max_errors=11), tmp_path)
    assert set(on_disk(tmp_path).values()) == {1}


def test_an_episode_that_is_asked_for_twice_is_refused(tasks, tmp_path):
    with pytest.raises(DataError) as caught:
        run_episodes([*tasks, tasks[1]], PLAN, tmp_path / "out")
    assert str(caught.value) == (
        "tasks: 1 episodes are asked for more than once, first 'alfworld/train/1#expert#0'"
        " (2 times); list each task and each seed once"
    )
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_collection_is_refused(golden, tasks):
    before = on_disk(golden[0])
    for other, line in (
        (replace(PLAN, job_seed=1), "seed was 0, is 1"),
        (replace(PLAN, settings=EpisodeSettings(prompt="alfworld_v1")), "settings.prompt was"),
    ):
        with pytest.raises(RunStateError, match=f"trajectories of another collection .{line}"):
            run_episodes(tasks, other, golden[0])
    assert on_disk(golden[0]) == before


def budget(calls, **fields):
    return TeacherConfig(budget=BudgetConfig(calls=calls, **fields))


def test_a_budget_of_teacher_calls_holds_for_all_actors_and_after_a_restart(tasks, tmp_path):
    plan = replace(PLAN, num_actors=2, source=Source.SELF_REFLECTED, teacher=budget(12))
    summary = run_episodes(tasks, plan, tmp_path)
    assert (summary.teacher_calls, summary.spent_calls) == (12, 12)
    assert summary.num_episodes + summary.num_not_started == 6
    assert summary.num_not_started >= 1
    assert set(summary.stop_reasons) <= {"budget", "success"}
    lines = {t.error for t in read_trajectories(tmp_path) if t.stop_reason is StopReason.BUDGET}
    assert lines <= {"teacher.budget.calls: all 12 are spent or reserved"}

    before = on_disk(tmp_path)
    again = run_episodes(tasks, plan, tmp_path)
    assert (on_disk(tmp_path), again.teacher_calls) == (before, 12)
    assert (again.num_resumed, again.num_not_started) == (before.total(), summary.num_not_started)


def test_what_the_budget_ended_or_held_back_is_played_once_it_is_raised(tasks, tmp_path):
    plan = replace(PLAN, source=Source.SELF_REFLECTED, teacher=budget(12))
    first = run_episodes(tasks, plan, tmp_path)
    finished = first.stop_reasons.get("success", 0)

    summary = run_episodes(tasks, replace(plan, teacher=budget(1000)), tmp_path)
    assert (summary.stop_reasons, summary.num_resumed) == ({"success": 6}, finished)
    assert summary.num_not_started == 0
    assert [t.trajectory_id for t in read_trajectories(tmp_path)] == ids(
        tasks, source=Source.SELF_REFLECTED
    )
    assert summary.spent_calls == total_usage(tmp_path).teacher_calls >= 12 + 6 - finished


def test_episodes_in_flight_may_finish_over_the_budget(tasks, tmp_path):
    plan = replace(PLAN, source=Source.SELF_REFLECTED, teacher=budget(2, at_limit="finish"))
    summary = run_episodes(tasks, plan, tmp_path)
    # two episodes run at once; whoever starts after the second call is told not to
    assert set(summary.stop_reasons) == {"success"}
    assert 1 <= summary.num_episodes <= 3
    assert summary.num_not_started == 6 - summary.num_episodes
    assert summary.spent_calls == summary.teacher_calls > 2


class Contented(JsonHandler):
    """A teacher that finds every step good; its replies count 100 and 10 tokens."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.read()
        self.server.sessions.append(self.headers["x-session-id"])
        text = '{"verdict": "good", "reflection": "", "thought": "", "action": ""}'
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        self.reply({**answer, "choices": [choice], "usage": usage})


@pytest.fixture
def contented():
    with running(Contented, sessions=[]) as server:
        yield server


def test_a_rerun_is_judged_from_the_cache_and_costs_nothing(tasks, tmp_path, contented):
    teacher = TeacherConfig(
        kind="llm",
        base_url=f"http://127.0.0.1:{contented.server_port}/v1",
        model="m",
        api_key_env="STEP_RAY_TEST_KEY",
        requests_per_minute=60_000,
        budget=BudgetConfig(money=1000),
    )
    plan = replace(
        PLAN,
        num_actors=2,
        source=Source.SELF_REFLECTED,
        teacher=teacher,
        prices={"m": Price(prompt=10_000, completion=100_000)},  # 1 + 1 a call
        cache_dir=str(tmp_path / "cache"),
    )
    first = run_episodes(tasks, plan, tmp_path / "first")
    calls = len(contented.sessions)
    assert set(contented.sessions) == {f"{task.task_id}#0" for task in tasks}
    assert (first.teacher_calls, first.teacher_tokens) == (calls, 110 * calls)
    assert first.teacher_cost == first.spent_money == pytest.approx(2 * calls)
    assert (first.teacher_cached_calls, first.cache_faults) == (0, 0)

    again = run_episodes(tasks, plan, tmp_path / "again")
    assert len(contented.sessions) == calls
    assert (again.teacher_calls, again.teacher_cached_calls) == (0, calls)
    assert (again.spent_calls, again.teacher_cost, again.num_success) == (0, 0.0, 6)
    texts = [
        [(t.trajectory_id, [s.text for s in t.steps]) for t in read_trajectories(tmp_path / name)]
        for name in ("first", "again")
    ]
    assert texts[0] == texts[1]


class Refusing(Contented):
    """An endpoint that wants another key."""

    def do_POST(self):
        self.read()
        self.server.sessions.append(self.headers["x-session-id"])
        self.send_error(401)


def test_an_endpoint_that_refuses_the_key_stops_the_stage_at_once(tasks, tmp_path, contented):
    contented.RequestHandlerClass = Refusing
    teacher = TeacherConfig(
        kind="llm",
        base_url=f"http://127.0.0.1:{contented.server_port}/v1",
        model="m",
        api_key_env="STEP_RAY_TEST_KEY",
    )
    plan = replace(PLAN, source=Source.SELF_REFLECTED, teacher=teacher, max_error_share=0.9)
    many = [replace(task, task_id=f"{task.task_id}-{i}") for task in tasks for i in range(9)]
    with pytest.raises(EndpointError, match=r"^m at http:.*: HTTP 401: .* what has ended is kept"):
        run_episodes(many, plan, tmp_path)
    assert 1 <= len(contented.sessions) < 20
    assert on_disk(tmp_path).total() >= 1


DRIVER = """
import sys, time
from pathlib import Path
from step_ray.collect import run_episodes
from step_ray.config import RayConfig
from step_ray.cluster.raysetup import connected
from step_ray.tasks import read_tasks
from test_collect import PLAN

def slowly(trajectory):
    print(trajectory.trajectory_id, flush=True)
    time.sleep(0.5)

with connected(RayConfig(num_cpus=4, object_store_mb=100)):
    run_episodes(read_tasks(Path(sys.argv[1])), PLAN, Path(sys.argv[2]), on_episode=slowly)
"""


def test_a_killed_driver_leaves_whole_shards_and_a_second_start_finishes(tasks, tmp_path):
    many = [replace(task, task_id=f"{task.task_id}-{i}") for task in tasks for i in range(3)]
    manifest, out = tmp_path / "tasks.parquet", tmp_path / "out"
    write_tasks(manifest, many)
    assert read_tasks(manifest) == many
    command = [sys.executable, "-c", DRIVER, str(manifest), str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What this module can import, the driver's actors can too.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, cwd=ROOT, text=True, env=env, **pipes) as driver:
        announced = [driver.stdout.readline().strip() for _ in range(3)]
        driver.kill()
        said = driver.stderr.read()
    assert all(announced), said
    assert " WARNING " not in said
    survived = on_disk(out)
    assert set(survived.values()) == {1}
    assert set(announced[:2]) <= set(survived) < set(ids(many))

    summary = run_episodes(many, PLAN, out)
    assert on_disk(out) == Counter(ids(many))
    assert summary.num_resumed == len(survived)
    assert summary.num_success == len(many) == 18
