"""A node on Ray answers health probes by a token that goes through all stages of a replica."""

import grpc

from tests.harness import Server


def test_a_token_goes_through_the_stages(servers: dict[str, Server]) -> None:
    for server in servers.values():
        with grpc.insecure_channel(server.address) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            assert check(b"", timeout=60) == b"\x08\x01", server.log
