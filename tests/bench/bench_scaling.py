"""Collection and evaluation on 1, 2 and 4 logical nodes against an endpoint of fixed latency.

    python tests/bench/bench_scaling.py [--nodes 1 2 4] [--per-node 16] [--latency 1] [--turns 10]

A logical node is a Ray node of its own (raylet, object store, workers) on this machine; each holds
one actor with `--per-node` episodes at once, so what is offered grows with the nodes and so should
the calls per second that reach the endpoint. `efficiency` is that rate on n nodes over n times the
rate on one node, both of this run; `of ideal` is the rate over in-flight / latency. Collection has
the oracle as its teacher. The nodes share this machine's cores: what the table shows is what
step_ray and Ray lose by coordination, not what a network costs. `driver ms` is CPU of the driver's
process per episode, start and end of the job included.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ray
from bench_collect import endpoint, make_tasks, many, rates
from machine import Stolen
from ray.cluster_utils import Cluster

from step_ray.cluster.raysetup import ENVIRONMENT
from step_ray.collect import run_episodes
from step_ray.collection.runner import EpisodePlan
from step_ray.collection.teacher_config import TeacherConfig
from step_ray.rollout import EpisodeSettings
from step_ray.types import Source

STORE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


def plans(args: argparse.Namespace, service: object) -> dict[str, EpisodePlan]:
    """The two kinds of episodes, for one node."""
    evaluation = EpisodePlan(
        source=Source.STUDENT,
        settings=EpisodeSettings(prompt="alfworld_short", max_steps=args.turns),
        env="alfworld",
        student=service.address,
        episodes_per_actor=args.per_node,
        cpus_per_actor=1.0,
        node_labels={"role": "rollout"},
    )
    teacher = TeacherConfig(kind="oracle", max_corrections=2)
    collection = replace(evaluation, source=Source.SELF_REFLECTED, teacher=teacher)
    return {"collection": collection, "evaluation": evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--per-node", type=int, default=16, help="episodes at once on a node")
    parser.add_argument("--latency", type=float, default=1.0, help="of a call, seconds")
    parser.add_argument("--turns", type=int, default=10, help="most per episode")
    parser.add_argument("--waves", type=int, default=4, help="episodes per place in flight")
    args = parser.parse_args()
    for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
        os.environ.setdefault(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **STORE})
    ray.init(address=cluster.address, log_to_driver=False)
    print(f"{'':10} {'nodes':>5} {'calls/s':>8} {'of ideal':>8} {'efficiency':>10} driver ms")
    try:
        with tempfile.TemporaryDirectory() as folder, endpoint(args.latency) as service:
            tasks, single, there = make_tasks(Path(folder) / "games", "small"), {}, 0
            for number in args.nodes:
                for _ in range(number - there):
                    cluster.add_node(num_cpus=1, labels={"role": "rollout"}, **STORE)
                there = number
                for kind, plan in plans(args, service).items():
                    out = Path(folder) / f"{kind}-{number}"
                    plan = replace(plan, num_actors=number, min_actors=number)
                    todo = many(tasks, number * args.per_node * args.waves)
                    stolen, cpu = Stolen(), time.process_time()
                    service.stats()
                    summary = run_episodes(todo, plan, out)
                    cpu = 1e3 * (time.process_time() - cpu) / len(todo)
                    arrivals = service.stats()["arrivals"]
                    _, rate = rates(arrivals, args.latency)
                    single.setdefault(kind, rate / number)
                    ideal = number * args.per_node / args.latency
                    print(
                        f"{kind:10} {number:5} {rate:8.1f} {100 * rate / ideal:6.1f} %"
                        f" {100 * rate / number / single[kind]:8.1f} % {cpu:10.1f};"
                        f" {summary.num_episodes} episodes, {len(arrivals)} calls,"
                        f" {summary.num_errors} errors; {stolen}",
                        flush=True,
                    )
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
