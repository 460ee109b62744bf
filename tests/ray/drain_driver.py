"""Training and Serve on nodes that are drained: `python drain_driver.py FOLDER`.

Prints one JSON line for each. FOLDER holds a model and examples, see test_preemption.py.
"""

import itertools
import json
import sys
import threading
import time
from pathlib import Path

import openai
from fault_driver import STORE, drain, seats
from ray import serve

from step_ray.config import TrainConfig
from step_ray.serve import deploy
from step_ray.serving.config import ServeConfig
from step_ray.train import train
from step_ray.training.job import read_lines

NOTICE_S = 20.0
"""Ray Train asks for drained nodes once a second here."""


def wait_for(condition):
    """Poll until it is true."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def drain_one(cluster, nodes, seat):
    """Drain a node; it goes when its time is over."""
    node_id = next(node for node, name in seats().items() if name == seat)
    drain(cluster, node_id, NOTICE_S)
    gone = threading.Timer(NOTICE_S, cluster.remove_node, [nodes[seat], False])
    gone.start()
    return gone


def training(cluster, nodes, folder):
    """Two workers on two nodes, of which one is drained."""
    work = folder / "work"
    config = TrainConfig(
        **{"num_workers": (1, 2), "epochs": 60, "batch_tokens": 128, "micro_batch_tokens": 64},
        **{"checkpoint_every": 100_000, "max_failures": 0},
    )
    timers = []

    def drain_when_trained():
        wait_for(lambda: len(read_lines(work / "metrics.jsonl")) > 20)
        timers.append(drain_one(cluster, nodes, "b"))

    watch = threading.Thread(target=drain_when_trained)
    watch.start()
    seen = []
    result = train(
        config,
        **{"init": str(folder / "model"), "dtype": "float32", "examples_dir": folder / "examples"},
        **{"output_dir": folder / "out", "work_dir": work, "seed": 3, "name": "t"},
        on_progress=lambda line: seen.append(line["step"]),
    )
    watch.join()
    timers[0].join()
    return {
        "kind": "training",
        "starts": read_lines(work / "starts.jsonl"),
        "notices": read_lines(work / "preemptions.jsonl"),
        "steps": [line["step"] for line in read_lines(work / "metrics.jsonl")],
        "num_steps": result.num_steps,
        "most_before": next((a for a, b in itertools.pairwise(seen) if b < a), 0),
    }


def replica_seats():
    """Where the replicas are that serve."""
    from ray._private.state import actors

    names = seats()
    return sorted(
        str(names[actor["Address"]["NodeID"]])
        for actor in actors().values()
        if "AgentServer" in actor["ActorClassName"] and actor["State"] == "ALIVE"
    )


def serving(cluster, nodes, folder):
    """Two replicas on two nodes, of which one is drained while clients ask; a third one waits."""
    config = ServeConfig(port=0, num_replicas=2, node_labels={"role": "serve"}, drain_timeout_s=10)
    endpoint = deploy(str(folder / "model"), "m", config, max_length=64)
    before, answers, faults, is_over = replica_seats(), [], [], threading.Event()
    nodes["e"] = add(cluster, "e", "serve")

    def ask():
        # like the clients of a rollout it sends again what a dying proxy has swallowed
        client = openai.OpenAI(base_url=endpoint.base_url, api_key="none", max_retries=3)
        question = [{"role": "user", "content": "go"}]
        while not is_over.is_set():
            try:
                client.chat.completions.create(model="m", messages=question, max_tokens=4)
                answers.append(time.monotonic())
            except openai.OpenAIError as exc:
                faults.append(repr(exc))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    wait_for(lambda: len(answers) > 20)
    gone = drain_one(cluster, nodes, "d")
    wait_for(lambda: replica_seats() == ["c", "e"])
    gone.join()
    moved = len(answers)
    wait_for(lambda: len(answers) > moved + 20)
    is_over.set()
    for client in clients:
        client.join()
    serve.shutdown()
    pause_s = max(b - a for a, b in itertools.pairwise(sorted(answers)))
    told = {"before": before, "answers": len(answers), "faults": faults, "pause_s": pause_s}
    return {"kind": "serving", **told}


def add(cluster, seat, role):
    """A node with room for one worker or replica."""
    return cluster.add_node(num_cpus=1, labels={"role": role, "seat": seat}, **STORE)


def main(folder):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **STORE})
    ray.init(address=cluster.address, log_to_driver=False)
    for play, role, seats_ in ((training, "train", "ab"), (serving, "serve", "cd")):
        nodes = {seat: add(cluster, seat, role) for seat in seats_}
        print(json.dumps(play(cluster, nodes, folder)), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
