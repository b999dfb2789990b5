"""Sessions with ports over mutual TLS, and one beside each test that must go on as if alone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from tests.bad_input.raw import identity
from tests.dlora.frames import PortClient, backward, forward, port_opening
from tests.harness import Server

Connect = Callable[..., PortClient]


@pytest.fixture(scope="package")
def credentials(owner: Path) -> Credentials:
    return identity(owner, "alice")


@pytest.fixture(scope="package")
def connect(guarded: Server, credentials: Credentials, card: pb.ModelCard) -> Connect:
    """Open a session of a name of its own, at `SITES`."""
    return lambda **changes: PortClient(guarded.address, credentials, port_opening(card, **changes))


def step(client: PortClient, microbatch: int = 1 << 40) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward and its backward answer where every question is answered as is due."""
    output, asked = client.through(*forward(microbatch))
    gradient, asked_back = client.through(*backward(microbatch))
    assert [len(asked), len(asked_back)] == [2, 2]
    return output.tensor.clone(), gradient.tensor.clone()


@pytest.fixture(scope="package")
def expected(connect: Connect) -> tuple[torch.Tensor, torch.Tensor]:
    with connect() as client:
        return step(client)


def assert_goes_on(client: PortClient, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(step(client), expected, strict=True))


@pytest.fixture(autouse=True)
def others_go_on(connect: Connect, expected: tuple[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """A session beside whatever a test does gets the same numbers during it and afterwards."""
    with connect() as beside:
        yield
        assert_goes_on(beside, expected)
