"""`step-ray serve`: one model behind the OpenAI API until it is interrupted.

Takes a config and a model folder; prints how to call it. It trains and evaluates nothing.
"""

import signal
from collections.abc import Callable
from functools import partial

from step_ray.cluster.logs import reporter_for
from step_ray.cluster.raysetup import connected
from step_ray.cluster.resources import SERVE, place, refuse_locally
from step_ray.config import RunConfig


def serve_forever(config: RunConfig, model_dir: str, name: str) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: no model folder there, or no place for the replicas.
    """
    from step_ray.serve import deploy

    tell = _teller(config)
    if config.ray.address == "local":
        refuse_locally(config, [SERVE])
    with connected(config.ray):
        if line := place(config, [SERVE]):
            tell(f"waits {line}")
        endpoint = deploy(
            model_dir,
            name,
            config.served,
            max_length=config.student.max_length,
            dtype=config.student.dtype,
        )
        tell(f"{name} at {endpoint.base_url}/chat/completions; Ctrl-C stops it")
        try:
            _wait_for_signal()
        finally:
            endpoint.close()


def _teller(config: RunConfig) -> Callable[[str], None]:
    """Shows a line: on stdout, or as a log line of the driver."""
    if config.ray.log_format == "json":
        return reporter_for(config).line
    return partial(print, flush=True)


def _wait_for_signal() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
