"""Every call and every kind of frame that a peer may send, tried by one role on one object; what came of it, as a word.

Objects: `own` is one's own, `another's` belongs to the other tenant (or is granted to it alone), `unknown` is nobody's.
"""

import itertools
from collections.abc import Callable, Iterator

import grpc
import torch

from edge_client.stream import open_channel
from isthmus import PROTOCOL, bundle
from isthmus.bundle import Manifest
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.status import read_status
from tests.bad_input.raw import RawStream, describe, hidden, request
from tests.dlora.frames import GROUP, ROWS, SITES, WIDTHS, PortClient, answer, backward, forward, port_opening
from tests.policy.conftest import RIGHTS, Nodes

WITHIN_S = 30.0
PARTNER = {"alice": "bob", "bob": "alice", "cara": "alice", "anonymous": "alice"}
"""Whose objects are another's."""

_numbers = itertools.count()


class Asker:
    """One role at the node that it can reach."""

    def __init__(self, nodes: Nodes, role: str) -> None:
        self.nodes, self.role, self.partner = nodes, role, PARTNER[role]
        self.address, self.credentials = nodes.server(role).address, nodes.credentials(role)
        self.card = describe(nodes.guarded.address, nodes.credentials("alice"))

    def outcome(self, action: str, thing: str) -> str:
        """`ok`, or the name of the error in the catalogue."""
        service, _, name = action.partition(".")
        if service == "frame":
            return self._in_a_session(name, thing)
        try:
            with open_channel(self.address, self.credentials) as channel:
                stubs = {"Backbone": pb_grpc.BackboneStub, "Offsite": pb_grpc.OffsiteStub, "Rounds": pb_grpc.RoundsStub}
                return str(CALLS[action](self, stubs[service](channel), thing))
        except grpc.RpcError as error:
            named = read_status(error.details())
            return named.code if named is not None else error.code().name

    def describe(self, stub: pb_grpc.BackboneStub, thing: str) -> str:
        """What the card shows is one's own, and nothing else."""
        protocol = 0 if thing == "unknown" else PROTOCOL
        card = stub.Describe(pb.DescribeRequest(protocol=protocol), timeout=WITHIN_S)
        shown = {f"{cut.bottom}:{cut.top}" for cut in card.cuts}
        return "ok" if self._shows(shown, "cuts", thing) else "hidden"

    def offers(self, stub: pb_grpc.OffsiteStub, thing: str) -> str:
        """The list, as the card."""
        protocol = 0 if thing == "unknown" else PROTOCOL
        shown = {offer.name for offer in stub.List(pb.ListRequest(protocol=protocol), timeout=WITHIN_S).emulators}
        return "ok" if self._shows(shown, "emulators", thing) else "hidden"

    def fetch_ends(self, stub: pb_grpc.BackboneStub, thing: str) -> str:
        """The ends of a cut."""
        cuts = {"own": self._own("cuts", self.role), "another's": self._own("cuts", self.partner)}
        held = describe(self.nodes.guarded.address, self.nodes.credentials(self._granted(thing)))
        wanted = [cut.ends_bundle for cut in held.cuts if f"{cut.bottom}:{cut.top}" == cuts.get(thing)]
        return self._fetch(stub.FetchEnds, wanted)

    def fetch(self, stub: pb_grpc.OffsiteStub, thing: str) -> str:
        """An emulator."""
        names = {"own": self._own("emulators", self.role), "another's": self._own("emulators", self.partner)}
        found = self.nodes.emulators / names.get(thing, "") / "manifest.json"
        return self._fetch(stub.Fetch, [Manifest.parse(found.read_bytes()).id] if found.exists() else [])

    def submit(self, stub: pb_grpc.OffsiteStub, thing: str) -> str:
        """An adapter that one has signed, that another has, and nothing that is one."""
        whose = {"own": self.role if self.role != "anonymous" else "alice", "another's": self.partner}.get(thing)
        frames = self._bundle(whose) if whose is not None else iter([pb.BundleFrame(data=b"x")])
        stub.Submit(frames, timeout=WITHIN_S)
        return "ok"

    def round(self, call: Callable[..., object], kind: type, thing: str) -> str:
        """Rounds of a name: that one is granted, that the other is, and that nobody is."""
        names = {"own": self._own("rounds", self.role), "another's": self._own("rounds", self.partner)}
        name = names.get(thing, "nobodys")
        call(kind(terms=pb.RoundTerms(name=name)) if kind is pb.RoundJoin else kind(name=name), timeout=WITHIN_S)
        return "ok"

    def exchange(self, _: object, thing: str) -> str:
        """A session of a new name; one that another has open; one at a cut that nobody offers."""
        changes = {"bottom": 3, "top": 3} if thing == "unknown" else {}
        if thing == "another's":
            theirs, name = self.nodes.credentials(self.partner), self._name()
            with PortClient(self.nodes.guarded.address, theirs, port_opening(self.card, name)):
                return self._first(port_opening(self.card, name))
        return self._first(port_opening(self.card, self._name(), **changes))

    def _first(self, opening: pb.Open) -> str:
        with RawStream(self.address, self.credentials) as stream:
            stream.send(pb.ClientFrame(open=opening))
            word = _word(stream.receive())
            if word == "ok":
                stream.finish()  # in good order, or the session would wait to be opened again
            return word

    def _in_a_session(self, body: str, thing: str) -> str:
        if thing == "unknown":  # a session that nobody has opened
            with RawStream(self.address, self.credentials) as stream:
                stream.send(_bare(body))
                return _word(stream.receive())
        if thing == "another's":
            return self.exchange(None, thing)
        if (refused := self._first(port_opening(self.card, self._name()))) != "ok":
            return refused
        with PortClient(self.address, self.credentials, port_opening(self.card, self._name())) as client:
            return FRAMES[body](client)

    def _name(self) -> str:
        return f"matrix-{self.role}-{next(_numbers)}"

    def _granted(self, thing: str) -> str:
        return self.role if thing == "own" and self.role in RIGHTS else self.partner

    def _own(self, kind: str, role: str) -> str:
        """What is granted to one of the two alone; who has no rights tries the first's."""
        return RIGHTS.get(role, RIGHTS["alice"])[kind][-1]

    def _shows(self, shown: set[str], kind: str, thing: str) -> bool:
        return self._own(kind, self.role if thing == "own" else self.partner) in shown

    def _fetch(self, call: Callable[..., Iterator[pb.BundleFrame]], wanted: list[str]) -> str:
        frames = call(pb.FetchRequest(bundle=wanted[0] if wanted else "0" * 64), timeout=WITHIN_S)
        return "ok" if sum(len(frame.data) for frame in frames) else "empty"

    def _bundle(self, whose: str) -> Iterator[pb.BundleFrame]:
        folder = self.nodes.adapters / whose
        manifest = Manifest.parse((folder / "manifest.json").read_bytes())
        yield pb.BundleFrame(manifest=manifest.to_bytes(), signature=bundle.read_signature(folder))
        for offset, data in bundle.read(folder, manifest, 0):
            yield pb.BundleFrame(offset=offset, data=data)


def _word(frame: pb.ServerFrame | None) -> str:
    assert frame is not None, "the stream ended without a word"
    return "ok" if frame.HasField("opened") else frame.failure.code


def _bare(body: str) -> pb.ClientFrame:
    """A frame of a kind, with nothing in it."""
    frame = pb.ClientFrame()
    getattr(frame, body.partition(":")[0]).SetInParent()
    return frame


def _call(client: PortClient, *frames: pb.ClientFrame) -> str:
    reply, _ = client.through(*frames)
    return reply.code or "ok"


def _backward(client: PortClient) -> str:
    return _call(client, *forward()) + "+" + _call(client, *backward())


def _decode(client: PortClient) -> str:
    fields = {"rows": (4,), "sequence": pb.Sequence(id="text")}
    return _call(client, *request(1, [hidden(4)], pb.PASS_DECODE, **fields))


def _park(client: PortClient) -> str:
    shapes = [shape for site in SITES for shape in ((2, client_inputs(site)), (WIDTHS[site], 2))]
    return _call(client, *request(1, [torch.ones(shape) for shape in shapes], pb.PASS_PARK))


def client_inputs(site: tuple[int, str]) -> int:
    """Values of a port's input."""
    return 64 if site not in GROUP else 32


def _port(client: PortClient) -> str:
    asked = client.begin(*forward())
    client.stream.send(*answer(asked, asked.due))
    client.stream.send(*answer(later := client.question(), later.due))
    return client.reply().code or "ok"


def _alive(client: PortClient, frame: pb.ClientFrame) -> str:
    client.stream.send(frame)
    return "ok" if client.is_alive() else "gone"


def _tally(client: PortClient) -> str:
    client.stream.send(pb.ClientFrame(tally=pb.Tally()))
    frame = client.stream.receive()
    return "ok" if frame is not None and frame.tally.received_bytes else "gone"


CALLS: dict[str, Callable[..., str]] = {
    "Backbone.Describe": Asker.describe,
    "Backbone.FetchEnds": Asker.fetch_ends,
    "Backbone.Exchange": Asker.exchange,
    "Offsite.List": Asker.offers,
    "Offsite.Fetch": Asker.fetch,
    "Offsite.Submit": Asker.submit,
    "Rounds.Join": lambda asker, stub, thing: asker.round(stub.Join, pb.RoundJoin, thing),
    "Rounds.Keys": lambda asker, stub, thing: asker.round(stub.Keys, pb.RoundKey, thing),
    "Rounds.Submit": lambda asker, stub, thing: asker.round(stub.Submit, pb.RoundSubmit, thing),
    "Rounds.Result": lambda asker, stub, thing: asker.round(stub.Result, pb.RoundAsk, thing),
}

FRAMES: dict[str, Callable[[PortClient], str]] = {
    "open": lambda client: "ok" if client.is_alive() else "gone",
    "call:forward": lambda client: _call(client, *forward()),
    "call:backward": _backward,
    "call:decode": _decode,
    "call:park": _park,
    "call:values": lambda client: _call(client, *request(1, [torch.ones(2, 2)], pb.PASS_VALUES)),
    "call:gradients": lambda client: _call(client, *request(1, [], pb.PASS_GRADIENTS)),
    "chunk": lambda client: _call(client, *forward()) if len(forward()) > 1 else "no chunk",
    "release": lambda client: _alive(client, pb.ClientFrame(release=pb.Release(sequences=["none"]))),
    "heartbeat": lambda client: "ok" if client.is_alive(nonce=ROWS[0]) else "gone",
    "tally": _tally,
    "port": _port,
}
