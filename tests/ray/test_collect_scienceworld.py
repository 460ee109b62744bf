"""ScienceWorld on Ray Data: a Java machine that dies takes its own episodes with it, no more."""

import json
from dataclasses import replace

import psutil
import pytest

from step_ray.collect import run_episodes
from step_ray.collection.runner import EpisodePlan
from step_ray.envs.scienceworld.gold import GoldMaker, GoldPath
from step_ray.envs.scienceworld.goldcache import with_gold
from step_ray.envs.scienceworld.tasks import make_task
from step_ray.rollout import EpisodeSettings, trajectory_id
from step_ray.store import read_trajectories
from step_ray.types import Source, StopReason

pytest.importorskip("scienceworld", reason="the extra `scienceworld` is not installed")
pytestmark = pytest.mark.usefixtures("ray_cluster")
NAME, VARIATION, SEEDS = "find-non-living-thing", 225, tuple(range(10))
PLAN = EpisodePlan(
    source=Source.EXPERT,
    settings=EpisodeSettings(prompt="scienceworld_short", show_admissible=False),
    env="scienceworld",
    num_actors=1,
    episodes_per_actor=2,
    rows_per_shard=1,
    max_error_share=0.5,
)


@pytest.fixture(scope="module")
def task():
    row = GoldMaker("easy", 256)({"task": NAME, "variation": VARIATION})
    return with_gold(make_task(NAME, VARIATION, "test"), GoldPath(**json.loads(row["record"])))


def machines():
    """The Java machines of Ray's workers, which are the grandchildren of this process."""
    children = psutil.Process().children()
    workers = [p for child in children for p in child.children(recursive=True)]
    return [p for p in workers if p.name() == "java"]


@pytest.mark.slow
def test_a_killed_machine_is_replaced_and_only_its_episodes_are_played_again(task, tmp_path):
    killed = []

    def kill_once(trajectory):
        if not killed:
            killed.extend(machines())
            for machine in killed:
                machine.kill()

    first = run_episodes([task], PLAN, tmp_path, seeds=SEEDS, on_episode=kill_once)
    assert len(killed) == 1
    assert first.num_success + first.num_errors == len(SEEDS)
    faulty = [t for t in read_trajectories(tmp_path) if t.stop_reason is StopReason.ENV_ERROR]
    assert len(faulty) == first.num_errors
    assert all("Java has died" in t.error for t in faulty)
    assert 1 <= first.num_errors <= 2  # as many as were in flight

    second = run_episodes([task], replace(PLAN, retry_errors=True), tmp_path, seeds=SEEDS)
    assert (second.num_success, second.num_resumed) == (len(SEEDS), first.num_success)
    names = sorted(trajectory_id(task.task_id, Source.EXPERT, seed) for seed in SEEDS)
    assert [t.trajectory_id for t in read_trajectories(tmp_path)] == names
