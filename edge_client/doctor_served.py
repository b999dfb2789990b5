"""What `doctor` asks the server: who it is, whether it lets this edge in and has room, and one token through its span.

Knows a node's calls and a session; nothing of the session is left when it is closed. What is sent is random numbers.
"""

import time
import uuid

import grpc

from edge_client.channel import explain, open_channel
from edge_client.examined import Patient, Verdict
from edge_client.link import Link
from isthmus import PROTOCOL, __version__
from isthmus.errors import CutError, UnreachableError, VersionError, WireError
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.gen import backbone_pb2_grpc as pb_grpc
from isthmus.wire.gen import health_pb2
from isthmus.wire.options import TIME

ANSWER_WITHIN_S = 20.0
PATIENCE_S = 5.0
SKEW_S = 300.0
"""Of clocks: certificates are issued to hold so much earlier."""


def versions(patient: Patient) -> Verdict:
    """Whether the server lets this identity ask, and speaks this protocol; its model card is kept.

    Raises:
        IsthmusError: it does not; ForbiddenError and CertificateError where this identity may not.
    """
    request = pb.DescribeRequest(protocol=PROTOCOL, client_version=__version__)
    with open_channel(patient.server, patient.credentials) as channel:
        began = time.time()
        try:
            stub = pb_grpc.BackboneStub(channel)  # type: ignore[no-untyped-call]
            card, call = stub.Describe.with_call(request, timeout=ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            raise explain(error, patient.server, patient.credentials) from None
        middle = (began + time.time()) / 2
        said = dict(call.initial_metadata()).get(TIME)
    if card.protocol != PROTOCOL:
        raise VersionError(f"the server speaks protocol {card.protocol} and this edge {PROTOCOL}; match the versions")
    patient.card, patient.clock_s = card, _number(said, middle)
    if card.server_version != __version__:
        both = f"the server is isthmus {card.server_version:.40} and this edge {__version__}"
        return Verdict("warn", f"{both}: protocol {PROTOCOL} is the same; install the same version if anything is odd")
    return Verdict("pass", f"isthmus {__version__}, protocol {PROTOCOL} on both sides")


def _number(said: str | bytes | None, here: float) -> float | None:
    try:
        return float(said) - here if said is not None else None
    except ValueError:
        return None


def authority(patient: Patient) -> Verdict:
    """How the server reads this edge's certificate; that it answers at all was found before."""
    return Verdict("pass", f"the server knows this edge as {patient.described.identity:.100}")


def clock(patient: Patient) -> Verdict:
    """Whether both clocks agree, which dates of certificates depend on."""
    if patient.clock_s is None:
        return Verdict("skip", "the server does not tell its time: it is of an older version")
    figures, ahead = {"ahead_s": patient.clock_s}, "ahead of" if patient.clock_s > 0 else "behind"
    if abs(patient.clock_s) > SKEW_S:
        said = f"the server's clock is {abs(patient.clock_s):.0f} s {ahead} this one"
        return Verdict("warn", f"{said}: set the one that is wrong (NTP), or certificates fail early or late", figures)
    return Verdict("pass", f"the server's clock is {abs(patient.clock_s):.1f} s {ahead} this one", figures)


def model(patient: Patient) -> Verdict:
    """What is served.

    Raises:
        CutError: nothing is.
    """
    card = patient.described
    if not card.cuts:
        raise CutError("the server offers no cut: its owner starts it with --cut")
    cuts = ", ".join(f"{cut.bottom}:{cut.top}" for cut in card.cuts)
    return Verdict(
        "pass", f"{card.model:.60}, {card.blocks} blocks of width {card.hidden_size}, cuts {cuts}, {card.dtype}"
    )


def health(patient: Patient) -> Verdict:
    """What the server's own health check says, which runs a real token.

    Raises:
        UnreachableError: it does not serve.
    """
    with open_channel(patient.server, patient.credentials) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthRequest.SerializeToString,
            health_pb2.HealthAnswer.FromString,
        )
        try:
            answer = check(health_pb2.HealthRequest(), timeout=ANSWER_WITHIN_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return Verdict("skip", "the server has no health service: it is of an older version")
            raise explain(error, patient.server, patient.credentials) from None
    if answer.status != health_pb2.HealthAnswer.SERVING:
        raise UnreachableError("the server says that it is not serving: it drains, or its span is stuck; ask its owner")
    return Verdict("pass", "the server says that it is serving")


def session(patient: Patient) -> Verdict:
    """Whether the server opens a session for this edge.

    Raises:
        IsthmusError: DrainingError, LimitError where it is full, ForbiddenError where this edge may not.
    """
    card = patient.described
    opening = pb.Open(
        protocol=PROTOCOL,
        session=f"doctor-{uuid.uuid4().hex}",
        bottom=card.cuts[0].bottom,
        top=card.cuts[0].top,
        model_digest=card.model_digest,
        codec_activation="none",
        codec_gradient="none",
        forward_only=True,
    )
    patient.link = Link(patient.server, patient.credentials, opening, patient.ledger, card.limits, PATIENCE_S)
    patient.link.open()
    return Verdict("pass", "the server has room and opens a session")


def token(patient: Patient) -> Verdict:
    """Whether one token comes through the span as numbers.

    Raises:
        WireError: it does not.
    """
    import torch

    from edge_client.doctor_speed import backbone, rows_of

    began = time.perf_counter()
    token_ND = torch.ones(1, patient.described.hidden_size)
    output_KD, _ = backbone(patient).forward(token_ND, rows_of(1), False)
    spent = time.perf_counter() - began
    if not bool(torch.isfinite(output_KD).all()):
        raise WireError("a token came out of the span as no number: tell the owner; bfloat16 may be what it needs")
    return Verdict("pass", f"one token went through the span and back, in {1e3 * spent:.1f} ms", {"token_s": spent})
