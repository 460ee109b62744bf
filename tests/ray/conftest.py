"""One private Ray cluster for all tests of this folder."""

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Four logical CPUs, whatever the machine has, so that readers and actors fit."""
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=150 * 1024**2,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
