"""Asks a server whether it is ready; as a program, for container health checks: ``python -m service.health [PORT]``."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.wire import APPLICATION, SERVICE_NAME


def serving(port: int, host: str = "127.0.0.1", timeout_s: float = 2.0) -> bool:
    """Return whether the server at an address says that it is serving, asked on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"{host}:{port}", options) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                request, timeout=timeout_s, wait_for_ready=True, metadata=[("application", APPLICATION)]
            )
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(int(sys.argv[1]) if len(sys.argv) > 1 else 9000) else 1)
