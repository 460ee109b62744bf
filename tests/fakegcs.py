"""A server that speaks as much of the protocol of a Ray head as joining a cluster needs."""

import json
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from ray.core.generated import (
    autoscaler_pb2,
    autoscaler_pb2_grpc,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
)


class Head(
    gcs_service_pb2_grpc.NodeInfoGcsServiceServicer,
    gcs_service_pb2_grpc.InternalKVGcsServiceServicer,
    autoscaler_pb2_grpc.AutoscalerStateServiceServicer,
):
    """Answers with given versions; `token` is asked for when it is given."""

    def __init__(self, versions: dict[str, str], token: str | None) -> None:
        self.versions, self.token = versions, token
        self.drained: list[Any] = []

    def _check(self, context: grpc.ServicerContext) -> None:
        sent = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and sent != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: wrong or missing")

    def GetClusterId(self, request, context):
        self._check(context)
        return gcs_service_pb2.GetClusterIdReply(cluster_id=b"c" * 28)

    def InternalKVGet(self, request, context):
        self._check(context)
        reply = gcs_service_pb2.InternalKVGetReply()
        if request.key == b"CLUSTER_METADATA":
            reply.value = json.dumps(self.versions).encode()
        else:
            reply.status.code = 17  # NotFound
        return reply

    def DrainNode(self, request, context):
        self._check(context)
        self.drained.append(request)
        return autoscaler_pb2.DrainNodeReply(is_accepted=True)


@contextmanager
def head(versions: dict[str, str], token: str | None = None) -> Iterator[tuple[str, Head]]:
    """Such a server on a free port; gives its address."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = Head(versions, token)
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(servicer, server)
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(servicer, server)
    autoscaler_pb2_grpc.add_AutoscalerStateServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("0.0.0.0:0")  # Ray turns localhost into its IP
    server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        server.stop(0).wait()
