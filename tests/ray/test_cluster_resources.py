"""What a live cluster says of itself."""

import time

import pytest
import ray

from step_ray.cluster.resources import can_grow, cluster_nodes, has_label

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_private_cluster_has_its_logical_cpus():
    (node,) = cluster_nodes()
    assert (node.get("CPU"), node.get("GPU")) == (4, 0)
    assert has_label(node, "ray.io/node-id", ray.get_runtime_context().get_node_id())


def test_a_cluster_without_an_autoscaler_cannot_grow_once_its_monitor_has_reported():
    deadline = time.monotonic() + 60
    while can_grow():
        assert time.monotonic() < deadline
        time.sleep(0.5)
