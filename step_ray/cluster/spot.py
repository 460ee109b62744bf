"""A spot machine's notice becomes a drained Ray node: work moves away while there is time.

Takes the metadata service of a cloud, gives a drain request to the head, which Ray hands to
training (a checkpoint), Serve (replicas elsewhere) and Data (no new episodes). Ray itself hears
SIGTERM only, which a virtual machine gets too late. It ends no process.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from step_ray.errors import ClusterError, ConfigError, boundary

POLL_S = 2.0
"""Google's notice comes 30 s before the end, Amazon's two minutes."""
TIMEOUT_S = 5.0
GCP_NOTICE_S = 25.0
"""Of Google's 30 s, less what polling and the request take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """Where a machine reads its own fate."""

    base_url: str
    notice: Callable[[str], float | None]
    """Base URL -> seconds that are left; None while nothing is announced."""


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text; None for HTTP 404."""
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as exc:
        if exc.code == 404:
            return None
        raise


def _aws_notice(base_url: str) -> float | None:
    # version 2 of the service: a token first, so that a redirected request reads nothing
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{base_url}/latest/api/token", ttl, "PUT") or ""
    action = _ask(
        f"{base_url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}
    )
    if action is None:
        return None
    end = datetime.fromisoformat(json.loads(action)["time"])
    return max(0.0, (end - datetime.now(UTC)).total_seconds())


def _gcp_notice(base_url: str) -> float | None:
    url = f"{base_url}/computeMetadata/v1/instance/preempted"
    answer = _ask(url, {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if answer is not None and answer.strip().upper() == "TRUE" else None


CLOUDS = {
    "aws": Cloud(base_url="http://169.254.169.254", notice=_aws_notice),
    "gcp": Cloud(base_url="http://metadata.google.internal", notice=_gcp_notice),
}


def watch(cloud: str, tell: Callable[[str], object], base_url: str = "") -> None:
    """Wait for this machine's notice, then drain its node; returns when that is asked for.

    A metadata service that does not answer is asked again: a notice may still come.

    Args:
        cloud: `aws` or `gcp`.
        tell: called with each line worth a log.
        base_url: another metadata service than the cloud's.

    Raises:
        ConfigError: an unknown cloud.
        ClusterError: no Ray node here, or its head refuses.
    """
    if cloud not in CLOUDS:
        raise ConfigError(f"--cloud: {cloud!r} is not known; use one of {sorted(CLOUDS)}")
    place, is_silent = CLOUDS[cloud], False
    url = base_url or place.base_url
    tell(f"watching {url} for the end of this machine")
    while True:
        try:
            left_s = place.notice(url)
        except (OSError, ValueError) as exc:
            if not is_silent:
                tell(f"{url} does not answer ({exc}); asked again every {POLL_S:g} s")
            left_s, is_silent = None, True
        else:
            is_silent = False
        if left_s is not None:
            drain_this_node(left_s, f"{cloud} takes this machine back")
            tell(f"the machine ends in {left_s:.0f} s; its Ray node is drained")
            return
        time.sleep(POLL_S)


def drain_this_node(left_s: float, why: str, address: str = "auto") -> None:
    """Ask the head to move work away from the node of this machine.

    Raises:
        ClusterError: no Ray node runs here, or the head does not accept.
    """
    from ray._private import services
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    nodes = sorted(services.find_node_ids())
    if not nodes:
        raise ClusterError("no Ray node runs on this machine; start one with `ray start`")
    with boundary(ClusterError, "the head cannot be asked to drain this node"):
        client = GcsClient(address=services.canonicalize_bootstrap_address_or_die(address))
        for node in nodes:
            accepted, reason = client.drain_node(
                node,
                DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
                why,
                int((time.time() + left_s) * 1000),
                timeout=TIMEOUT_S,
            )
            if not accepted:
                raise ClusterError(f"the head does not drain this node: {reason}")
