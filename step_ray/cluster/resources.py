"""Whether a cluster can ever hold what a run asks Ray for; Ray itself would wait without an end.

Takes a config, the names of the stages to do and the resources of nodes, gives one line or nothing.
It refuses only what is certain: sums that do not fit, and single workers that no node can hold.
What others hold just now is told.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from step_ray.config import BASE, RayConfig, RunConfig, TrainConfig
from step_ray.errors import ConfigError

MIN_LOGICAL_CPUS = 4
"""Ray Data's readers, rollout actors and a Serve replica need logical CPUs side by side."""
SERVE = "serve"
"""In a list of stages: `step-ray serve`, which is none of a run's."""
READER_CPUS = 1.0
"""What Ray Data takes for a task that reads or writes."""

Amounts = Mapping[str, float]
"""Ray's resource names (`CPU`, `GPU`) -> amount."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of a cluster."""

    amounts: Amounts
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's labels, those that Ray sets itself too."""

    def get(self, name: str) -> float:
        """How much it has of a resource."""
        return self.amounts.get(name, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Processes of one kind that have to run at the same time."""

    key: str
    """The setting to name."""
    count: int
    each: Amounts
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label -> what a node must have there, in Ray's words; see `has_label`."""
    is_range: bool = False
    """`count` is the least number, and Ray takes as many as it thinks that fit."""

    def __str__(self) -> str:
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in self.each.items() if amount)
        where = "".join(f" on {label}: {value}" for label, value in self.labels.items())
        return f"{self.key}: {self.count} x ({amounts}{where})"

    def total(self, name: str) -> float:
        """What all of them take of one resource."""
        return self.count * self.each.get(name, 0.0)


def has_label(node: Node, label: str, wanted: str) -> bool:
    """Whether Ray's label selector `label: wanted` takes a node.

    `wanted` is `value`, `in(a,b)`, or one of these with `!` before it, which takes nodes without
    the label too.
    """
    is_negated, words = wanted.startswith("!"), wanted.removeprefix("!")
    values = [words]
    if words.startswith("in(") and words.endswith(")"):
        values = [value.strip() for value in words[3:-1].split(",")]
    return (node.labels.get(label) in values) is not is_negated


def local_nodes(config: RayConfig, *, with_gpus: bool) -> list[Node]:
    """The one node of the cluster that `connected` starts for `ray.address: local`."""
    num_gpus = 0
    if with_gpus:
        import torch

        num_gpus = torch.cuda.device_count()
    return [Node(amounts={"CPU": logical_cpus(config), "GPU": num_gpus})]


def logical_cpus(config: RayConfig) -> int:
    """CPUs of a local cluster."""
    return config.num_cpus or max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)


def needs_gpus(config: RunConfig) -> bool:
    """Whether any stage asks for a GPU."""
    return bool(config.train.use_gpu or config.arm_train().use_gpu or config.serve.gpus_per_replica)


def fault(config: RunConfig, stages: Sequence[str], nodes: Sequence[Node]) -> str | None:
    """Why the stages can never run on these nodes; None when they may."""
    for demands in together(config, stages):
        for demand in demands:
            if demand.labels and not any(_takes(node, demand) for node in nodes):
                return _label_line(demand, nodes)
        for name in ("CPU", "GPU"):
            have = sum(node.get(name) for node in nodes)
            if sum(demand.total(name) for demand in demands) > have:
                return _line(max(demands, key=lambda d: d.total(name)), demands, nodes)
        for demand in demands:
            fit = [node for node in nodes if _takes(node, demand)]
            if sum(_places(demand.each, node) for node in fit) < demand.count:
                return _line(demand, [demand], fit)
            if demand.is_range and len(fit) < len(nodes):
                others = [node for node in nodes if not _takes(node, demand)]
                if any(_places(demand.each, node) for node in others):
                    return _range_line(demand)
    return None


def taken(config: RunConfig, stages: Sequence[str], free: Amounts) -> str | None:
    """What the stages would wait for, because others on the cluster hold it now; None: nothing.

    Args:
        config: the run.
        stages: those to do.
        free: what nobody holds, over all nodes.
    """
    for demands in together(config, stages):
        for name in ("CPU", "GPU"):
            wanted = sum(demand.total(name) for demand in demands)
            if wanted > free.get(name, 0.0) + 1e-6:
                which = " and ".join(str(demand) for demand in demands if demand.total(name))
                return (
                    f"{wanted:g} {name} are wanted at once ({which}), {free.get(name, 0.0):g} are"
                    " free; others on the cluster hold the rest"
                )
    return None


def _range_line(demand: Demand) -> str:
    """Ray 2.60 counts the workers that all nodes could hold, and waits for ever for those that have
    to be elsewhere."""
    return (
        f"train.num_workers: with a range, Ray counts nodes without train.node_labels too, and"
        f" others here have room for a worker ({demand}); give one number, or start those nodes"
        " without such resources"
    )


def _takes(node: Node, demand: Demand) -> bool:
    return all(has_label(node, label, wanted) for label, wanted in demand.labels.items())


def _label_line(demand: Demand, nodes: Sequence[Node]) -> str:
    wanted = ", ".join(f"{label}: {value}" for label, value in demand.labels.items())
    found = sorted({node.labels.get(label, "none") for node in nodes for label in demand.labels})
    section = demand.key.partition(".")[0]
    return (
        f"{section}.node_labels: no node of the cluster has {wanted} (there: {', '.join(found)});"
        " label nodes with `ray start --labels`, or mend the setting"
    )


def together(config: RunConfig, stages: Sequence[str]) -> list[list[Demand]]:
    """The lists of demands that have to be met at the same time while these stages run."""
    rollouts = [
        Demand(
            key="collect.cpus_per_actor",
            count=config.collect.min_actors,
            each={"CPU": config.collect.cpus_per_actor},
            labels=config.collect.node_labels,
        ),
        Demand(key="the reader of the task list", count=1, each={"CPU": READER_CPUS}),
    ]
    serve = config.serve
    cpus = serve.cpus_per_replica if serve.engine == "transformers" else 0.0
    each = {"CPU": cpus, "GPU": serve.gpus_per_replica}
    replicas = Demand(
        key="serve.autoscaling.min_replicas" if serve.autoscaling else "serve.num_replicas",
        count=serve.least_replicas,
        each=each,
        labels=serve.node_labels,
    )
    # a student behind an address takes nothing of this cluster
    is_collecting = "collect" in stages and config.collect.endpoint is None
    is_serving_student = is_collecting or "own" in stages
    plays_alone = any(name == "expert" or name.startswith("outside:") for name in stages)
    plays_alone |= "collect" in stages and not is_collecting
    moments = [rollouts] if plays_alone else []
    if SERVE in stages:
        moments.append([replicas])
    if is_serving_student or any(name.startswith("evaluate:") for name in stages):
        moments.append([replicas, *rollouts])
    for name in stages:
        if name.startswith("train:"):
            is_base = name == f"train:{BASE}"
            workers = _workers(config.train if is_base else config.arm_train())
            # the agent of the collection is served on while the arms train, unless it holds a GPU
            is_serving = not is_base and is_serving_student and not serve.gpus_per_replica
            moments.append([workers, replicas] if is_serving else [workers])
    return moments


def _workers(train: TrainConfig) -> Demand:
    each = {"CPU": float(train.cpus_per_worker), "GPU": float(train.use_gpu)}
    return Demand(
        key="train.num_workers",
        count=train.least_workers,
        each=each,
        labels=train.node_labels,
        is_range=train.most_workers > train.least_workers,
    )


def _places(each: Amounts, node: Node) -> int:
    """How many processes a node can hold."""
    rooms = [int((node.get(name) + 1e-6) / amount) for name, amount in each.items() if amount]
    return min(rooms, default=1)


def _line(demand: Demand, demands: Sequence[Demand], nodes: Sequence[Node]) -> str:
    beside = " and ".join(str(other) for other in demands if other is not demand)
    have = ", ".join(f"{sum(n.get(name) for n in nodes):g} {name}" for name in ("CPU", "GPU"))
    where = "the cluster has" if len(nodes) == 1 else f"the {len(nodes)} nodes of the cluster have"
    if demand.labels and demands == [demand]:
        where = "the nodes with these labels have"
    return (
        f"{demand} does not fit{' beside ' + beside if beside else ''}; {where} {have};"
        " lower it or use a larger cluster"
    )


def cluster_nodes() -> list[Node]:
    """The resources and labels of the living nodes of the cluster that Ray is connected to."""
    import ray

    return [
        Node(amounts=node["Resources"], labels=node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def refuse_locally(config: RunConfig, stages: Sequence[str]) -> None:
    """Look before the local cluster is started, which never grows.

    Raises:
        ConfigError: the stages can never run on it.
    """
    line = fault(config, stages, local_nodes(config.ray, with_gpus=needs_gpus(config)))
    if line:
        raise ConfigError(line)


def place(config: RunConfig, stages: Sequence[str]) -> str | None:
    """What the stages have to wait for on the cluster that Ray is connected to; None: nothing.

    Raises:
        ConfigError: they can never run there.
    """
    line = fault(config, stages, cluster_nodes())
    if line and not can_grow():
        raise ConfigError(line)
    if line:
        return f"until the cluster grows: {line}"
    if config.ray.address == "local":  # where nobody else is
        return None
    # this may pass, so it is told and not refused: Ray would wait without a word
    line = taken(config, stages, free_resources())
    return f"for resources: {line}" if line else None


def free_resources() -> Amounts:
    """What nobody holds of the cluster that Ray is connected to."""
    import ray

    free: Amounts = ray.available_resources()
    return free


def can_grow() -> bool:
    """Whether an autoscaler may add nodes; what does not tell counts as one.

    Every head runs a monitor that reports what it knows. Without an autoscaler it names each node
    after itself; with one, after the node types that it starts.
    """
    from ray.experimental.internal_kv import _internal_kv_get  # the report has no public call

    status = _internal_kv_get("__autoscaling_status")
    report = json.loads(status).get("autoscaler_report") if status else None
    if not report:
        return True
    types: Mapping[str, str] = report.get("node_type_mapping") or {}
    return not types or any(name != f"node_{node}" for node, name in types.items())
