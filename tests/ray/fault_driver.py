"""A collection in a process of its own: `python fault_driver.py KIND URL TASKS OUT`.

KIND `alone` starts a local cluster, and is there to be killed; `nodes` starts three nodes and
removes one that plays.
"""

import dataclasses
import json
import sys
from pathlib import Path

from step_ray.collect import run_episodes
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.rollout import EpisodeSettings
from step_ray.tasks import read_tasks
from step_ray.types import Source

CONCURRENCY = 8
"""Episodes at once in an actor."""
ROWS_PER_SHARD = 4


def make_plan(url, try_timeout_s=60.0, **changes):
    """Two actors; episodes of three turns. On a busy machine nothing healthy takes a minute."""
    teacher = TeacherConfig(
        **{"kind": "llm", "base_url": url, "model": "teacher", "max_corrections": 1},
        **{"api_key_env": "STEP_RAY_TEST_KEY", "cache": False, "max_concurrency": 64},
        **{"timeout_s": 60, "try_timeout_s": try_timeout_s},
    )
    plan = EpisodePlan(
        source=Source.SELF_REFLECTED,
        settings=EpisodeSettings(
            prompt="alfworld_short", max_steps=3, step_timeout_s=60, episode_timeout_s=120
        ),
        env="alfworld",
        student=Address(base_url=url, model="student"),
        teacher=teacher,
        num_actors=2,
        min_actors=2,
        episodes_per_actor=CONCURRENCY,
        rows_per_shard=ROWS_PER_SHARD,
        try_timeout_s=try_timeout_s,
    )
    return dataclasses.replace(plan, **changes)


def rollout_actors():
    """Pid and node of the actors that play."""
    from ray._private.state import actors  # the public list needs the dashboard

    return [
        (actor["Pid"], actor["Address"]["NodeID"])
        for actor in actors().values()
        if "EpisodeRunner" in actor["ActorClassName"] and actor["State"] == "ALIVE"
    ]


def alone(plan, tasks, out):
    """Play until somebody kills this process."""
    from step_ray.cluster.raysetup import connected
    from step_ray.config import RayConfig

    with connected(RayConfig(num_cpus=4, object_store_mb=100)):
        run_episodes(tasks, plan, out, on_episode=lambda t: print(t.trajectory_id, flush=True))


def nodes(plan, tasks, out):
    """Play on two labelled nodes, of which one goes while it plays."""
    import ray
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **store})
    players = {
        seat: cluster.add_node(num_cpus=1, labels={"role": "rollout", "seat": seat}, **store)
        for seat in ("a", "b")
    }
    ray.init(address=cluster.address, log_to_driver=False)
    seats = {node["NodeID"]: node["Labels"].get("seat") for node in ray.nodes()}
    seen, removed = [], []

    def remove_one(outcome):
        seen.append(outcome.trajectory_id)
        if len(seen) == len(tasks) // 4:
            taken = {seats[home] for _, home in rollout_actors()}
            assert taken <= players.keys(), "an actor beside its label"
            removed.append(min(taken))
            cluster.remove_node(players[removed[0]], allow_graceful=False)

    plan = dataclasses.replace(plan, node_labels={"role": "rollout"})
    summary = run_episodes(tasks, plan, out, on_episode=remove_one)
    print(json.dumps({"removed": len(removed), **dataclasses.asdict(summary)}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    kind, url, tasks_file, folder = sys.argv[1:]
    arguments = make_plan(url), read_tasks(Path(tasks_file)), Path(folder)
    {"alone": alone, "nodes": nodes}[kind](*arguments)
