"""What an edge opens a session with: who it is and what it asks for.

Knows settings, credentials and the opening message; knows no model and no span.
"""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_client.config import TrainConfig
from isthmus import PROTOCOL
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.trust.address import is_loopback, split_address
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

if TYPE_CHECKING:
    from isthmus.ports import Port


def credentials_for(config: TrainConfig, address: str) -> Credentials | None:
    """This edge's identity in a run; None where it may go without.

    Raises:
        UsageError: another machine would be spoken to in plaintext, which was not asked for.
    """
    return checked_credentials(address, config.certs, config.insecure)


def checked_credentials(address: str, certs: Path | None, insecure: bool) -> Credentials | None:
    """The identity in a folder; None where a server may be spoken to without.

    Raises:
        UsageError: as `credentials_for`.
    """
    if certs is not None:
        if insecure:
            raise UsageError("--certs and --insecure contradict each other; give one")
        return Credentials.load(certs)
    host, _ = split_address(address)
    if not insecure and not is_loopback(host):
        raise UsageError(
            f"{host} is another machine: give --certs DIR (the folder the model owner issued), or --insecure"
        )
    return None


def signer_of(config: TrainConfig) -> Ed25519PublicKey | None:
    """The key that this edge signs with; None where it has no identity, and its bundles prove nothing."""
    return Credentials.load(config.certs).signing_key().public_key() if config.certs is not None else None


def opening_of(
    config: TrainConfig, cut: Cut, card: pb.ModelCard, ports: "tuple[Port, ...]", forward_only: bool
) -> pb.Open:
    """The message that opens a session of a new name; `forward_only` asks for no right to a backward."""
    return pb.Open(
        protocol=PROTOCOL,
        session=uuid.uuid4().hex,
        bottom=cut.bottom,
        top=cut.top,
        model_digest=card.model_digest,
        codec_activation=config.codec,
        codec_gradient=config.gradient_codec,
        deterministic=config.deterministic,
        forward_only=forward_only,
        ports=[port.to_wire() for port in ports],
        codec_port=config.port_codec if ports else "",
    )


def required(value: str | None, flag: str) -> str:
    """The value of a flag that a method cannot do without.

    Raises:
        UsageError: it was not given.
    """
    if value is None:
        raise UsageError(f"{flag} is needed")
    return value
