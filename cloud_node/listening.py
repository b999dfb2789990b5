"""A node's gRPC server on its address: whether that is free, and which calls are answered there.

Knows addresses, handlers and credentials; what is answered comes from the service.
"""

import socket
from typing import Any

import grpc
import grpc.aio

from cloud_node.service import BackboneService
from cloud_node.watch_calls import CallCounter
from isthmus.errors import UsageError
from isthmus.trust.address import split_address
from isthmus.trust.credentials import Credentials
from isthmus.wire import options
from isthmus.wire.frames import read_client_frame, serialise
from isthmus.wire.gen import backbone_pb2 as pb


def require_free(listen: str, flag: str) -> None:
    """Refuse an address that another process listens on.

    Raises:
        UsageError: it is taken, or not of this machine.
    """
    host, port = split_address(listen)
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just left is free
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        raise taken(listen, flag, error.strerror) from None


def taken(listen: str, flag: str, why: str | None = None) -> UsageError:
    """What to say of an address that cannot be had."""
    reason = f"cannot listen on {listen}" + (f" ({why})" if why else "")
    return UsageError(f"{reason}; is another node running there? choose another {flag}")


async def serve(
    service: BackboneService,
    listen: str,
    credentials: Credentials | None,
    *further: "grpc.GenericRpcHandler[Any, Any]",
) -> tuple[grpc.aio.Server, int]:
    """Start a server; port 0 takes a free one. `further` are the calls of other contracts that it answers too.

    Returns:
        The started server and its port.

    Raises:
        OSError: the address cannot be bound.
    """
    interceptors = (CallCounter(service.watch, service.audit, service.revoked),)
    server = grpc.aio.server(options=options.SERVER, interceptors=interceptors, maximum_concurrent_rpcs=options.CALLS)
    server.add_generic_rpc_handlers((_handlers(service), *further))
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials.server())
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}") from error
    await server.start()
    return server, port


def _handlers(service: BackboneService) -> "grpc.GenericRpcHandler[Any, Any]":
    """The contract's calls; frames have a codec of their own, which spares their bytes protobuf's copies."""
    calls = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            service.Describe, pb.DescribeRequest.FromString, pb.ModelCard.SerializeToString
        ),
        "FetchEnds": grpc.unary_stream_rpc_method_handler(
            service.FetchEnds, pb.FetchRequest.FromString, pb.BundleFrame.SerializeToString
        ),
        "Exchange": grpc.stream_stream_rpc_method_handler(service.Exchange, read_client_frame, serialise),
    }
    return grpc.method_handlers_generic_handler("isthmus.v1.Backbone", calls)
