"""A spot notice, from a metadata service over HTTP, becomes a drain request to the head."""

import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from step_ray.cluster import spot
from step_ray.errors import ClusterError, ConfigError
from tests.fakegcs import head

NODE = "ab" * 28
VERSIONS = {"ray_version": "x", "python_version": "y"}


@pytest.fixture
def service(monkeypatch):
    """Starts a metadata service; each call answers the next of a list, the last one for good."""
    monkeypatch.setattr(spot, "POLL_S", 0.01)
    servers = []

    def start(answers):
        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                self._say(200, "token-1")

            def do_GET(self):
                is_aws = self.headers.get("X-aws-ec2-metadata-token") == "token-1"
                is_gcp = self.headers.get("Metadata-Flavor") == "Google"
                assert is_aws == self.path.startswith("/latest/")
                assert is_gcp == self.path.startswith("/computeMetadata/")
                self._say(*(answers.pop(0) if len(answers) > 1 else answers[0]))

            def _say(self, code, text):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture
def ray_head(monkeypatch):
    with head(VERSIONS) as (address, servicer):
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {NODE})
        yield servicer


def drained_after(servicer, cloud, url):
    told = []
    before = time.time()
    spot.watch(cloud, told.append, url)
    (request,) = servicer.drained
    assert request.node_id.hex() == NODE
    assert request.reason == DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    return request.deadline_timestamp_ms / 1000 - before, told


def test_amazons_notice(service, ray_head):
    end = (datetime.now(UTC) + timedelta(seconds=100)).strftime("%Y-%m-%dT%H:%M:%SZ")
    url = service([(404, ""), (404, ""), (200, f'{{"action": "terminate", "time": "{end}"}}')])
    left_s, told = drained_after(ray_head, "aws", url)
    assert 90 < left_s < 101
    assert told[0] == f"watching {url} for the end of this machine"
    assert told[-1].endswith("its Ray node is drained")


def test_googles_notice(service, ray_head):
    url = service([(200, "FALSE"), (200, "TRUE")])
    left_s, _ = drained_after(ray_head, "gcp", url)
    assert 20 < left_s < 40


def test_a_service_that_fails_is_told_once_and_asked_again(service, ray_head):
    url = service([(503, ""), (503, ""), (200, "TRUE")])
    _, told = drained_after(ray_head, "gcp", url)
    assert len([line for line in told if "does not answer" in line]) == 1


def test_no_node_here(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_node_ids", set)
    with pytest.raises(ClusterError, match="no Ray node runs on this machine"):
        spot.drain_this_node(1.0, "why")


def test_an_unknown_cloud(step_ray):
    with pytest.raises(ConfigError):
        spot.watch("ours", print)
    code, _, lines = step_ray("spot-watch", "--cloud", "ours")
    assert (code, lines) == (
        2,
        ["step-ray: --cloud: 'ours' is not known; use one of ['aws', 'gcp']"],
    )
