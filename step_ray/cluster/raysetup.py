"""Starting and leaving Ray, with the settings that step_ray chooses on purpose.

Takes a `RayConfig`, gives a context in which Ray runs. It stops only what it started.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from step_ray.cluster.joining import GCS_ENVIRONMENT, check_cluster
from step_ray.cluster.resources import logical_cpus
from step_ray.config import RayConfig
from step_ray.errors import StepRayError, boundary

ENVIRONMENT = {
    # Usage statistics go to the Ray project; nobody here has asked the user.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts workers at nice 15; on a machine of one's own that only slows the run down.
    "RAY_worker_niceness": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray registers a checkpoint when it polls its workers; sooner means less lost to a kill.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # When a node has gone, Ray first counts on it once more; by itself it would wait a minute.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TOKENIZERS_PARALLELISM": "false",
    # A busy machine needs longer than Ray's 30 s to start its processes.
    "RAY_raylet_start_wait_time_s": "120",
}
STARTUP_CONCURRENCY = 8
"""Worker processes that a local raylet starts at a time, at least: it warns once there are three
times as many as this, which a run on a machine with few cores reaches by design."""
LOCAL_ENVIRONMENT = {
    # A private cluster on localhost without a dashboard has no port worth a token; with the default
    # Ray would write ~/.ray/auth_token.
    "RAY_AUTH_MODE": "disabled",
    # Nobody scrapes it either.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": str(max(STARTUP_CONCURRENCY, os.cpu_count() or 1)),
}


@contextmanager
def connected(config: RayConfig | None = None) -> Iterator[None]:
    """Run the block on Ray: on a private local cluster, or on the one that `address` names.

    Settings that the user has already exported are respected. If Ray is connected already, it is
    used and left alone.

    Raises:
        ClusterError: no cluster at the address, a wrong token, other versions; within 30 s.
    """
    config = config or RayConfig()
    local = config.address == "local"
    for name, value in {**ENVIRONMENT, **(LOCAL_ENVIRONMENT if local else GCS_ENVIRONMENT)}.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        with quiet_listing():
            yield
        return
    if not local:
        check_cluster(config.address)
    with boundary(
        StepRayError, f"ray.address: {config.address!r}: Ray cannot be started or joined"
    ):
        _init(config, local)
    try:
        with quiet_listing():
            yield
    finally:
        ray.shutdown()


@contextmanager
def quiet_listing() -> Iterator[None]:
    """Keep one traceback that means nothing off the terminal.

    When Ray Data 2.60 has listed the files that it is to read, it ends its helpers by an interrupt;
    on a busy machine the one that was to end the others dies of it.
    """
    before = threading.excepthook

    def hook(args: Any) -> None:
        name = args.thread.name if args.thread else ""
        if not (args.exc_type is InterruptedError and name.endswith("completion-signaler")):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _init(config: RayConfig, local: bool) -> None:
    import ray

    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if not local:
        ray.init(address=config.address, log_to_driver=False, logging_config=_logging(config))
        return
    ray.init(
        address="local",
        num_cpus=logical_cpus(config),
        include_dashboard=False,
        object_store_memory=config.object_store_mb * 1024**2,
        log_to_driver=False,
        configure_logging=True,
        logging_level="WARNING",
        logging_config=_logging(config),
    )


def _logging(config: RayConfig) -> Any:
    """How workers log; None: as Ray does by itself."""
    import ray

    return ray.LoggingConfig(encoding="JSON") if config.log_format == "json" else None
