"""A collection in a process of its own: `python fault_driver.py KIND URL TASKS OUT`.

KIND `alone` starts a local cluster, and is there to be killed; `nodes` starts three nodes and
removes one that plays; `leave` tells such a node first that it will go; `grow` starts two nodes and
adds two.
"""

import dataclasses
import json
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from step_ray.collect import run_episodes
from step_ray.collection.runner import Address, EpisodePlan
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.rollout import EpisodeSettings
from step_ray.store import read_trajectories
from step_ray.tasks import read_tasks
from step_ray.types import Source

CONCURRENCY = 8
"""Episodes at once in an actor."""
ROWS_PER_SHARD = 4
NOTICE_S = 15.0
"""Between the notice of a node and its end: an episode takes two seconds."""
STORE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


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


@contextmanager
def local_nodes(*seats):
    """A head without players and labelled nodes of one CPU; gives the cluster and its nodes."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **STORE})
    players = {seat: add_node(cluster, seat) for seat in seats}
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster, players
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster, seat):
    """A node for players."""
    return cluster.add_node(num_cpus=1, labels={"role": "rollout", "seat": seat}, **STORE)


def seats():
    """Node id -> its seat."""
    import ray

    return {node["NodeID"]: node["Labels"].get("seat") for node in ray.nodes()}


def drain(cluster, node_id, left_s):
    """What `ray drain-node` asks of the head: this node will be gone in so many seconds."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    accepted, why = GcsClient(address=cluster.address).drain_node(
        node_id,
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "a test",
        int((time.time() + left_s) * 1000),
    )
    assert accepted, why


def nodes(plan, tasks, out):
    """Play on two labelled nodes, of which one goes while it plays."""
    seen, removed = [], []

    with local_nodes("a", "b") as (cluster, players):

        def remove_one(outcome):
            seen.append(outcome.trajectory_id)
            if len(seen) == len(tasks) // 4:
                taken = {seats()[home] for _, home in rollout_actors()}
                assert taken <= players.keys(), "an actor beside its label"
                removed.append(min(taken))
                cluster.remove_node(players[removed[0]], allow_graceful=False)

        summary = run_episodes(tasks, on_labels(plan), out, on_episode=remove_one)
    tell(summary, removed=len(removed))


def leave(plan, tasks, out):
    """Play on two labelled nodes, of which one is drained and goes when its time is over."""
    seen, timers = [], []

    with local_nodes("a", "b") as (cluster, players):

        def drain_one(outcome):
            seen.append(outcome.trajectory_id)
            if len(seen) == len(tasks) // 4:
                home = min(home for _, home in rollout_actors())
                drain(cluster, home, NOTICE_S)
                gone = [players[seats()[home]], False]  # without grace
                timers.append(threading.Timer(NOTICE_S, cluster.remove_node, gone))
                timers[0].start()

        summary = run_episodes(tasks, on_labels(plan), out, on_episode=drain_one)
        timers[0].join()
    tell(summary, removed=len(timers))


def grow(plan, tasks, out):
    """Play on one labelled node, to which two more come while it plays."""
    ended, joined = [], []

    with local_nodes("a") as (cluster, _):

        def add_two(outcome):
            ended.append((time.monotonic(), outcome.trajectory_id))
            if len(ended) == len(tasks) // 6:
                joined.extend(add_node(cluster, seat) for seat in ("b", "c"))

        plan = on_labels(
            plan, num_actors=3, min_actors=1, cpus_per_actor=1.0, student=SeatAddress.of(plan)
        )
        summary = run_episodes(tasks, plan, out, on_episode=add_two)
    names = {t.trajectory_id: t.models["student"] for t in read_trajectories(out)}
    first = next(i for i, (_, name) in enumerate(ended) if names[name] != "student-a")
    times = [when for when, _ in ended]
    num_alone = len(tasks) // 6
    tell(
        summary,
        before=Counter(names[name] for _, name in ended[:num_alone]),
        after=Counter(names[name] for _, name in ended[num_alone:]),
        waited_s=times[first] - times[num_alone - 1],
        rate_before=(num_alone - 1) / (times[num_alone - 1] - times[0]),
        rate_after=(len(times) - 1 - first) / (times[-1] - times[first]),
    )


class SeatAddress(Address):
    """A student whose name says on which node it was asked."""

    @classmethod
    def of(cls, plan):
        """The student of a plan."""
        return cls(base_url=plan.student.base_url, model="student")

    def connect(self, **options):
        """Runs on the actor."""
        import ray

        seat = seats()[ray.get_runtime_context().get_node_id()]
        named = Address(base_url=self.base_url, model=f"student-{seat}")
        return named.connect(**options)


def on_labels(plan, **changes):
    """Only nodes with the label play."""
    return dataclasses.replace(plan, node_labels={"role": "rollout"}, **changes)


def tell(summary, **more):
    """The last line of this process."""
    print(json.dumps({**more, **dataclasses.asdict(summary)}), flush=True)


if __name__ == "__main__":
    kind, url, tasks_file, folder = sys.argv[1:]
    arguments = make_plan(url), read_tasks(Path(tasks_file)), Path(folder)
    {"alone": alone, "nodes": nodes, "leave": leave, "grow": grow}[kind](*arguments)
