"""Tensors through the whole stack and back, against raw bytes through the same gRPC.

Knows an engine that returns its input. Everything else is the product's: codec, finite check, checksum, chunks,
protocol buffers, TLS, event loop, and the same again on the way back.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.echo import Echo
from benchmarks.place import Place
from benchmarks.results import Figure, Outcome, Target
from cloud_node.calls import Limits
from cloud_node.engine import Answer, EngineCard, Load, Opening, Work
from cloud_node.listening import serve
from cloud_node.service import BackboneService, Model
from edge_client.link import Link
from edge_client.passes import RemoteBackbone
from isthmus import PROTOCOL, command
from isthmus.cut import Cut
from isthmus.ledger.record import Ledger
from isthmus.linears import Site
from isthmus.round_trips import Parked
from isthmus.rows import Rows
from isthmus.trust.credentials import Credentials
from isthmus.wire.chunks import CHUNK_BYTES
from isthmus.wire.codecs import encoded_size
from isthmus.wire.gen import backbone_pb2 as pb

TOKENS, HIDDEN = 2048, 4096
"""One request: 2,048 tokens of a model of 7 billion parameters, 32 MiB in float32."""

REQUESTS, IN_FLIGHT = 16, 4
LEAST_SHARE = {"none": 0.5, "bf16": 0.5}
DIGEST = "0" * 64


class IdentityEngine:
    """Returns what it is sent."""

    def describe(self) -> EngineCard:
        """See `Engine`."""
        return EngineCard((Cut(0, 0),), HIDDEN, "float32", "cpu")

    def open(self, session: str, opening: Opening) -> None:
        """See `Engine`."""

    def close(self, session: str) -> None:
        """See `Engine`."""

    def forward(self, _session: str, _microbatch: int, tensor: torch.Tensor, *_: Any) -> Answer:
        """See `Engine`."""
        return Answer(tensor, Work())

    backward = decode = forward

    def park(self, session: str, microbatch: int, adapters: Mapping[Site, Parked]) -> Answer:  # noqa: ARG002
        """See `Engine`."""
        return Answer(torch.empty(0, 0), Work())

    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """See `Engine`."""

    def load(self) -> Load:
        """See `Engine`."""
        return Load()

    def stop(self) -> None:
        """See `Engine`."""


def measure(place: Place, codec: str) -> Outcome:
    """The stack and the echo in turns, the same number of encoded bytes each, after one round that is not counted."""
    size = REQUESTS * encoded_size(codec, torch.float32, (TOKENS, HIDDEN))
    stack_s: list[float] = []
    echo_s: list[float] = []
    with (
        place.process("benchmarks.throughput", "--certs", place.server_certs) as address,
        place.process("benchmarks.echo", "--certs", place.server_certs) as echo_address,
    ):
        credentials = Credentials.load(place.edge_certs)
        link, echo = _link(address, credentials, codec), Echo(echo_address, credentials)
        remote = RemoteBackbone(link, Ledger(), codec, codec)
        try:
            for _ in range(place.repeats + 1):
                stack_s.append(_pour(remote))
                echo_s.append(echo.pour(bytes(CHUNK_BYTES), size // CHUNK_BYTES))
        finally:
            link.close()
            echo.close()
    return _outcome(codec, size, stack_s[1:], echo_s[1:])


def _link(address: str, credentials: Credentials, codec: str) -> Link:
    opening = pb.Open(
        protocol=PROTOCOL,
        session="throughput",
        model_digest=DIGEST,
        codec_activation=codec,
        codec_gradient=codec,
        forward_only=True,
    )
    link = Link(address, credentials, opening, Ledger(), Limits().to_wire())
    link.open()
    return link


def _pour(remote: RemoteBackbone) -> float:
    hidden_ND, rows = torch.randn(TOKENS, HIDDEN), Rows((TOKENS,), (0,))
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        began = time.perf_counter()
        for _ in pool.map(lambda _: remote.forward(hidden_ND, rows, keep=False), range(REQUESTS)):
            pass
        return time.perf_counter() - began


def _outcome(codec: str, size: int, stack_s: list[float], echo_s: list[float]) -> Outcome:
    shares = [echo / stack for stack, echo in zip(stack_s, echo_s, strict=True)]
    share = Figure.of(shares, "of the echo")
    stack, echo = _rate(size, stack_s), _rate(size, echo_s)
    figures = {
        "whole stack, encoded bytes each way": stack,
        "the same as float32 values": _rate(REQUESTS * TOKENS * HIDDEN * 4, stack_s),
        "raw echo, bytes each way": echo,
        "whole stack against the echo": share,
    }
    if codec not in LEAST_SHARE:
        return Outcome(figures, ())
    met = share.value >= LEAST_SHARE[codec]
    extra = 1000 * (1 / stack.value - 1 / echo.value)
    reason = f"a gigabyte each way takes {extra:.0f} ms longer than raw: converting, checking and copying"
    text = f"at least {LEAST_SHARE[codec]:g} of a raw byte echo on the same gRPC"
    return Outcome(figures, (Target(text, str(share), met, None if met else reason),))


def _rate(size: int, seconds: list[float]) -> Figure:
    return Figure.of([size / value / 1e9 for value in seconds], "GB/s")


def _serve(certs: Annotated[Path, typer.Option(help="folder of the server's certificate")]) -> None:
    """Serve the identity until stopped.

    Example: python -m benchmarks.throughput --certs certs/server
    """
    asyncio.run(_until_stopped(certs))


async def _until_stopped(certs: Path) -> None:
    service = BackboneService(IdentityEngine(), Model("identity", DIGEST, "{}", 1, {}), Limits())
    server, port = await serve(service, "127.0.0.1:0", Credentials.load(certs))
    print(f"throughput: ready on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    command.keep_freed_memory()
    typer.run(_serve)
