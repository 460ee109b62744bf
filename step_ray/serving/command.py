"""`step-ray serve`: one model behind the OpenAI API until it is interrupted.

Takes a config and a model folder; prints how to call it. It trains and evaluates nothing.
"""

import signal

from step_ray.cluster.raysetup import connected
from step_ray.config import RunConfig


def serve_forever(config: RunConfig, model_dir: str, name: str) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: no model folder there.
    """
    from step_ray.serve import deploy

    agent = config.serve.agent.for_run(
        config.env,
        config.run_dir,
        before_execution=config.teacher.when == "before_execution",
    )
    with connected(config.ray):
        endpoint = deploy(
            model_dir,
            name,
            config.serve.model_copy(update={"agent": agent}),
            max_length=config.student.max_length,
            dtype=config.student.dtype,
        )
        print(f"{name} at {endpoint.base_url}/chat/completions; Ctrl-C stops it", flush=True)
        try:
            _wait_for_signal()
        finally:
            endpoint.close()


def _wait_for_signal() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
