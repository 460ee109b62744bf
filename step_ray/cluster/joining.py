"""Whether a Ray cluster can be joined, asked before Ray tries: it gives up late and says little.

Takes an address as in `ray.address` (not `local`), gives nothing or raises one line that says what
to do. It starts nothing and leaves no connection.
"""

import socket
from typing import Any
from urllib.parse import urlsplit

from step_ray.errors import ClusterError, boundary

CONNECT_S = 5.0
GCS_ENVIRONMENT = {
    # Ray asks a silent address for 30 s after 10 s of trying to connect; with this, 18 in all.
    "RAY_py_gcs_connect_timeout_s": "8",
}
"""Read when Ray is loaded, so set before."""
SUBMIT = "`ray job submit --address http://HEAD:8265 -- python jobs/pipeline.py --config ...`"


def check_cluster(address: str) -> None:
    """Look whether a driver of this process can join the cluster; takes at most 25 s.

    Args:
        address: `auto`, `host:port` of a head, or `ray://host:port`.

    Raises:
        ClusterError: nothing runs there, it is no Ray, it refuses the token, this machine is none
            of its nodes, or it runs other versions.
    """
    _refuse_missing_token(address)
    if address.startswith("ray://"):
        _connect(address, urlsplit(address).netloc)
        return
    host_port = _resolve(address)
    _connect(address, host_port)
    client = _gcs_client(address, host_port)
    _refuse_other_versions(address, client)
    _refuse_strangers(address)


def _resolve(address: str) -> str:
    """`host:port` of the head."""
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address_or_die(address))
    except ConnectionError as exc:
        raise ClusterError(
            f"ray.address: {address!r}: no Ray cluster runs here; start one (`ray start --head`),"
            f" submit a job ({SUBMIT}), or set ray.address=local"
        ) from exc
    except Exception as exc:
        raise ClusterError(
            f"ray.address: {address!r} is no address; use local, auto or HOST:PORT"
        ) from exc


def _refuse_missing_token(address: str) -> None:
    """With a token wanted and none there, Ray's own code ends the process."""
    from ray import _raylet

    raylet: Any = _raylet
    if raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN and not _has_token():
        raise ClusterError(f"ray.address: {address!r}: {token_fault()}")


def _has_token() -> bool:
    """Whether there is a token; Ray raises for a path that cannot be read."""
    from ray import _raylet
    from ray.exceptions import AuthenticationError

    raylet: Any = _raylet
    try:
        return bool(raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError:
        return False


def _connect(address: str, host_port: str) -> None:
    host, _, port = host_port.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except ValueError as exc:
        raise ClusterError(f"ray.address: {address!r} is no address; give HOST:PORT") from exc
    except OSError as exc:
        reason = exc.strerror or "no answer"
        raise ClusterError(
            f"ray.address: {address!r}: no Ray cluster answers at {host_port} ({reason}); start it,"
            " mend the address, or set ray.address=local"
        ) from exc


def _gcs_client(address: str, host_port: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RpcError

    try:
        return GcsClient(address=host_port)
    except AuthenticationError as exc:
        raise ClusterError(f"ray.address: {address!r}: {token_fault()}") from exc
    except RpcError as exc:
        raise ClusterError(
            f"ray.address: {address!r}: what listens at {host_port} does not answer as the head of"
            " a Ray cluster; give the port of its GCS (6379 by default, not the dashboard's)"
        ) from exc


def token_fault() -> str:
    """What is wrong with this process's token, seen that a cluster has refused it."""
    from ray import _raylet

    raylet: Any = _raylet  # compiled, so that type checkers do not see into it
    sources = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        return f"the cluster wants a token; export RAY_AUTH_MODE=token and give it in {sources}"
    if not _has_token():
        return f"the cluster wants a token and there is none in {sources}"
    return f"the cluster refuses the token of this process; mend it in {sources}"


def _refuse_other_versions(address: str, client: Any) -> None:
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.utils import check_version_info, compute_version_info

    with boundary(ClusterError, f"ray.address: {address!r}: the cluster tells no versions"):
        theirs = get_cluster_metadata(client)
    try:
        check_version_info(theirs, "this machine")
    except RuntimeError as exc:
        ours = compute_version_info()
        raise ClusterError(
            f"ray.address: {address!r}: the cluster runs Ray {theirs['ray_version']} on Python"
            f" {theirs['python_version']}, this process Ray {ours[0]} on Python {ours[1]}; use the"
            " environment or image of the cluster"
        ) from exc


def _refuse_strangers(address: str) -> None:
    """A driver talks to the Ray node of its own machine; Ray would wait a minute for one."""
    from ray._private import services

    if not services.find_node_ids():
        raise ClusterError(
            f"ray.address: {address!r}: this machine is no node of the cluster; submit a job"
            f" ({SUBMIT}), or start a node here with `ray start --address={address}`"
        )
