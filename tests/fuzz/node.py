"""Inputs for a node, over real gRPC: every call and every frame, answered by name or with a status, and nothing else.

Knows raw calls and a node's process. An outcome is good if it is an answer of the contract, an error of the catalogue,
or a status by which gRPC itself says that something is too much.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from hypothesis import strategies as st

from edge_client.channel import open_channel
from isthmus.errors import catalogue
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.status import read_status
from tests.bad_input.raw import RawStream, describe, hidden, opening, request
from tests.fuzz.inputs import any_message, damage, damaged
from tests.fuzz.target import Feed, Target

WITHIN_S = 60.0
KNOWN = frozenset(catalogue()) - {"internal"}
ROWS = (5, 3)
UNARY = {
    "Backbone/Describe": pb.DescribeRequest(protocol=1),
    "Offsite/List": pb.ListRequest(protocol=1),
}
FETCHES = ("Backbone/FetchEnds", "Offsite/Fetch")


class Node:
    """A node's calls as bytes."""

    def __init__(self, address: str, identity: Credentials) -> None:
        self.address = address
        self.card = describe(address, identity)
        self._identity = identity
        self._channel = open_channel(address, identity)
        self._sessions = itertools.count()

    def close(self) -> None:
        """Give the line back."""
        self._channel.close()

    def unary(self, path: str, content: bytes) -> None:
        """One request, one answer."""
        _typed(lambda: [self._channel.unary_unary(f"/isthmus.v1.{path}")(content, timeout=WITHIN_S)])

    def fetch(self, path: str, content: bytes) -> None:
        """One request, an answer in frames."""
        _typed(lambda: self._channel.unary_stream(f"/isthmus.v1.{path}")(content, timeout=WITHIN_S))

    def submit(self, frames: list[bytes]) -> None:
        """A bundle in frames."""
        call = self._channel.stream_unary("/isthmus.v1.Offsite/Submit")
        _typed(lambda: [call(iter(frames), timeout=WITHIN_S)])

    def exchange(self, frames: list[bytes]) -> None:
        """A session, to its end."""
        with RawStream(self.address, self._identity) as stream:
            stream.send(*frames)
            try:
                answers = stream.finish()
            except grpc.RpcError as error:
                _check(error)
                return
        for frame in answers:
            failure = frame.failure if frame.HasField("failure") else frame.reply.failure
            assert not failure.code or failure.code in KNOWN, failure
            assert "\n" not in failure.message, failure
            assert frame.WhichOneof("body") is not None

    def opened(self) -> pb.ClientFrame:
        """An opening that is right, of one of a few sessions."""
        return pb.ClientFrame(open=opening(self.card, f"fuzz-{next(self._sessions) % 8}"))

    def conversation(self) -> list[bytes]:
        """A whole session that is right."""
        place, after = pb.Sequence(id="s"), pb.Sequence(id="s", start=5, after=2)
        frames = [
            self.opened(),
            *request(1, [hidden(*ROWS)], rows=ROWS, keep=True),
            *request(1, [hidden(*ROWS, seed=1)], pb.PASS_BACKWARD),
            *request(2, [hidden(*ROWS)], pb.PASS_DECODE, ROWS, sequence=place),
            *request(3, [hidden(1, 1)], pb.PASS_DECODE, (1, 1), "int8", sequence=after),
            pb.ClientFrame(heartbeat=pb.Heartbeat(nonce=1)),
            pb.ClientFrame(tally=pb.Tally()),
            pb.ClientFrame(release=pb.Release(keys=[pb.Key(microbatch=1)], sequences=["s"])),
        ]
        return [frame.SerializeToString() for frame in frames]


def _typed(call: Callable[[], object]) -> None:
    try:
        for _ in call():  # type: ignore[attr-defined]
            pass
    except grpc.RpcError as error:
        _check(error)


def _check(error: grpc.RpcError) -> None:
    named = read_status(error.details())
    if named is not None:
        assert named.code in KNOWN, error
        return
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error


def targets(node: Node, bundle: Path) -> Iterator[Target]:
    """Everything that a node takes, with how much of all inputs each gets."""
    for path, good in UNARY.items():
        feed: Feed = lambda content, path=path: node.unary(path, content)  # noqa: E731 (one line for each call)
        yield Target(path, 2, _request(type(good), [good.SerializeToString()]), feed)
    for path in FETCHES:
        feed = lambda content, path=path: node.fetch(path, content)  # noqa: E731
        good = pb.FetchRequest(bundle=node.card.cuts[0].ends_bundle)
        yield Target(path, 2, _request(pb.FetchRequest, [good.SerializeToString()]), feed)
    manifest, signature = (bundle / "manifest.json").read_bytes(), (bundle / "manifest.sig").read_bytes()
    submission = [pb.BundleFrame(manifest=manifest, signature=signature), pb.BundleFrame(offset=0, data=b"x" * 200)]
    frames = [frame.SerializeToString() for frame in submission]
    anything = st.lists(any_message(pb.BundleFrame).map(pb.BundleFrame.SerializeToString), max_size=4)
    harmed = damage().map(lambda changes: damaged(frames, changes))
    yield Target("Offsite/Submit", 3, st.one_of(anything, harmed), node.submit)
    whole = damage().map(lambda changes: damaged(node.conversation(), changes))
    yield Target("Exchange, a damaged session", 8, whole, node.exchange)
    frame = any_message(pb.ClientFrame).map(pb.ClientFrame.SerializeToString)
    begun = st.lists(frame, min_size=1, max_size=4).map(lambda sent: [node.opened().SerializeToString(), *sent])
    yield Target("Exchange, any frames", 6, begun, node.exchange)
    yield Target("Exchange, any beginning", 1, st.lists(frame, min_size=1, max_size=2), node.exchange)


def _request(
    kind: type[pb.DescribeRequest] | type[pb.ListRequest] | type[pb.FetchRequest], good: list[bytes]
) -> "st.SearchStrategy[bytes]":
    harmed = damage().map(lambda changes: b"".join(damaged(good, changes)))
    return st.one_of(any_message(kind).map(lambda sent: sent.SerializeToString()), harmed, st.binary(max_size=200))
