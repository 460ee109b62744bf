"""The served agent: a Ray Serve application that answers OpenAI chat requests with one model.

Takes a model folder, gives an application or a running endpoint. `build_app` is for `serve run` and
`serve deploy`, `app` for `serve build`, `deploy` for a driver; the engine `vllm` is Ray's own LLM
application (serving/vllm_app.py), built from the same arguments. What a replica does is in
serving/agent_server.py.

    serve run step_ray.serve:build_app model_dir=<folder> served_name=agent
    serve deploy jobs/serve.yaml
    STEP_RAY_MODEL_DIR=<folder> serve build step_ray.serve:app -o serve.yaml
"""

import hashlib
import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

import openai
import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client

from step_ray.calls.endpoint import NO_KEY
from step_ray.errors import ConfigError, EndpointError
from step_ray.serving.agent_server import AgentServer
from step_ray.serving.args import SESSION_ROUTING, ServeArgs
from step_ray.serving.config import ServeConfig
from step_ray.serving.vllm_app import build_vllm_app
from step_ray.training.student import check_model, load_tokenizer, resolve_init

APP_NAME = "step_ray_agent"
MODEL_VARIABLE = "STEP_RAY_MODEL_DIR"
"""Environment variable with the model that `serve build` builds for."""
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's switch (1: on) to HAProxy, which forwards requests without Python. It takes no router: an
episode stays with its replica when RAY_SERVE_HAPROXY_BALANCE_ALGORITHM is hdr(x-session-id)."""
REPLICA_KEYS = set(ServeConfig.model_fields) - {
    *("engine", "host", "port", "num_replicas", "autoscaling", "max_surge_percent"),
    *("cpus_per_replica", "gpus_per_replica", "node_labels", "api_key_env"),
    *("max_queued_requests", "drain_timeout_s"),
}
"""Settings that a replica must be started anew for."""


def build_app(args: ServeArgs) -> serve.Application:
    """The application for `serve run`, `serve build` or `serve.run`.

    Raises:
        ConfigError: the model cannot be found, the key's variable is not set, or the engine is not
            installed.
    """
    return _build(args, job_id="")


def _build(args: ServeArgs, job_id: str) -> serve.Application:
    try:
        source = resolve_init(args.model_dir)
        check_model(source, load_tokenizer(source))
    except ConfigError as exc:
        raise ConfigError(f"model_dir: {str(exc).removeprefix('student.init: ')}") from exc
    if args.engine == "vllm":
        return build_vllm_app(args)
    deployment = AgentServer.options(**_options(args))  # type: ignore[attr-defined]
    settings = {
        "device": "cuda" if args.gpus_per_replica else "cpu",
        "prefix_cache_mb": args.prefix_cache_mb,
        "key_digests": args.key_digests(),
    }
    config = ServeConfig(**args.model_dump(include=REPLICA_KEYS))
    if job_id:
        # Serve's version of the replicas' code: equal versions are reconfigured, not restarted.
        # serve.run draws a random one, so that every checkpoint would cost a process start. The
        # job is in it because another job may bring other code.
        text = json.dumps([job_id, settings, config.model_dump(mode="json")], sort_keys=True)
        version = hashlib.sha256(text.encode()).hexdigest()[:16]
        deployment = deployment.options(version=version, _internal=True)
    return cast(serve.Application, deployment.bind(config=config, **settings))


def _options(args: ServeArgs) -> dict[str, Any]:
    """Options of the deployment."""
    return {
        **args.replica_options(),
        "ray_actor_options": {
            "num_cpus": args.cpus_per_replica,
            "num_gpus": args.gpus_per_replica,
            "label_selector": args.node_labels or None,
        },
        # One batch in work, and the next one waiting in the replica. With a limit: all that may
        # wait, and room for what is refused, for the replica itself refuses (AgentServer).
        "max_ongoing_requests": 2 * args.max_batch_size + max(0, args.max_queued_requests),
        "user_config": args.model_spec(),
        "graceful_shutdown_timeout_s": args.drain_timeout_s,
        **_routing(),
    }


def _routing() -> dict[str, Any]:
    """Option of the deployment that requests come to first: which replica gets one."""
    if os.environ.get(HAPROXY_VARIABLE) == "1":
        return {}
    # set for one replica, too: a proxy keeps the router that it started with when replicas are
    # added
    return {"request_router_config": RequestRouterConfig.model_validate(SESSION_ROUTING)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A served model."""

    base_url: str
    """URL for OpenAI clients, ends in `/v1`."""
    model: str
    api_key: str = "none"
    app: str = APP_NAME

    def close(self) -> None:
        """Remove the application; does nothing when a later `deploy` has replaced this model.

        Serve's proxy and controller stay, as they may serve others; they end with the cluster.
        """
        with self._client() as client:
            if _served_models(client) != [self.model]:
                return
        serve.delete(self.app)

    def wait_until_served(self, timeout_s: float) -> None:
        """Wait for the proxy, which learns of a new application a moment after `serve.run`.

        Raises:
            EndpointError: no answer within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._client() as client:
            while _served_models(client) != [self.model]:
                if time.monotonic() > deadline:
                    raise EndpointError(
                        f"serve: {self.model!r} does not answer at {self.base_url} after"
                        f" {timeout_s:.0f} s; see the logs of Ray Serve"
                    )
                time.sleep(0.05)

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=10.0
        )


def deploy(
    model_dir: str,
    served_name: str,
    config: ServeConfig,
    *,
    max_length: int,
    dtype: Literal["float32", "bfloat16"] = "float32",
    timeout_s: float = 120.0,
    app: str = "",
) -> Endpoint:
    """Serve a model on the running Ray cluster and wait until it answers.

    A second call replaces the model of the first; with the same `config` the replicas keep their
    processes and only load the new weights. An `app` of another name is left alone; its URL has the
    name before `/v1`.

    Raises:
        ConfigError: see `build_app`; or Serve already runs on another port.
        EndpointError: the replicas do not start, or do not answer within `timeout_s`.
    """
    args = ServeArgs(
        **config.model_dump(exclude={"host", "port"}),
        model_dir=model_dir,
        served_name=served_name,
        max_length=max_length,
        dtype=dtype,
    )
    # set here and not before: Serve sets the level of its logger when it is imported
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    built = _build(args, job_id=ray.get_runtime_context().get_job_id())
    endpoint = Endpoint(
        base_url=f"http://{_start_http(config)}{f'/{app}' if app else ''}/v1",
        model=served_name,
        api_key=next(iter(args.api_keys()), NO_KEY),
        app=app or APP_NAME,
    )
    try:
        serve.run(built, name=endpoint.app, route_prefix=f"/{app}")
    except RuntimeError as exc:
        fault = f"serve: {served_name!r} cannot be started: {_start_fault(endpoint.app, str(exc))}"
        raise EndpointError(fault) from exc
    endpoint.wait_until_served(timeout_s)
    return endpoint


def _start_fault(name: str, message: str) -> str:
    """Why the replicas failed: the last line of their traceback, which serve.run leaves out."""
    app = serve.status().applications.get(name)
    details = [d.message for d in app.deployments.values()] if app else []
    lines = "\n".join([message, *details]).strip().splitlines()
    return lines[-1].strip()


def remove(app: str) -> None:
    """Remove an application, if Serve runs and has it; a killed job leaves its replicas behind."""
    if _get_global_client(raise_if_no_controller_running=False) is not None:
        serve.delete(app)


def _start_http(config: ServeConfig) -> str:
    """Start Serve's HTTP proxy unless it runs, and give its `host:port` for clients."""
    # no public call tells the port of a Serve instance that already runs
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        port = config.port or _free_port(config.host)
        serve.start(http_options={"host": config.host, "port": port})
    else:
        port = client.http_config.port
        if config.port not in (0, port):
            raise ConfigError(f"serve.port: {config.port}, but Serve runs on {port}; use that or 0")
    is_any = config.host in ("0.0.0.0", "::")
    return f"{ray.util.get_node_ip_address() if is_any else config.host}:{port}"


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _served_models(client: openai.OpenAI) -> list[str]:
    """Names of the models at an endpoint; empty while it does not answer."""
    try:
        return [model.id for model in client.models.list().data]
    except (openai.APIStatusError, openai.APIConnectionError):
        return []


def __getattr__(name: str) -> serve.Application:
    """`app`, for `serve build`, which takes an application and no arguments."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build_app(ServeArgs(model_dir=os.environ.get(MODEL_VARIABLE, "builtin:tiny-base")))
