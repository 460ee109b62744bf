"""A run on three nodes of which none shares a folder: `python store_driver.py CONFIG CACHES`.

The head has the driver and no CPU for work, `play` collects and serves, `train` trains; each has a
cache folder of its own below CACHES.
"""

import os
import sys
from pathlib import Path

from step_ray.config import load_config
from step_ray.pipeline import run
from step_ray.progress import Reporter

STORE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


def main(config_file, caches):
    os.environ["STEP_RAY_CACHE"] = str(caches / "head")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **STORE})
    try:
        for seat in ("play", "train"):
            cluster.add_node(
                num_cpus=4,
                labels={"seat": seat},
                env_vars={"STEP_RAY_CACHE": str(caches / seat)},
                **STORE,
            )
        run(load_config(config_file, [f"ray.address={cluster.address}"]), Reporter())
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
