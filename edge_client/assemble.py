"""The edge model put together: the ends with a span in their middle, or the whole model for `local`.

Knows which pieces make a model that can be called; trains nothing. The trainer never learns what the span is.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from edge_client.config import TrainConfig
from edge_client.link import Agreement, Link
from edge_client.outputs import select_outputs
from edge_client.remote import RemoteBackbone, RemoteSpan
from edge_client.server import choose_cut, describe, fetch_ends
from isthmus import PROTOCOL
from isthmus.blocks import BlockList, watch_owner
from isthmus.command import cache_directory
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger, Phase
from isthmus.load import DTYPES, load_ends, load_whole, model_digest, resolve
from isthmus.settings import pick_device
from isthmus.trust.address import is_loopback, split_address
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

Progress = Callable[[int, int], None]


@dataclass
class EdgeModel:
    """A model to call, its tokenizer, where it is cut, and the line to its span, if there is one."""

    model: PreTrainedModel
    found: BlockList
    cut: Cut
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    span_dtype: str
    row_tokens: int | None = None
    link: Link | None = None
    remote: RemoteBackbone | None = None

    @property
    def waited_s(self) -> float:
        """Seconds that this thread has waited for the cloud."""
        return self.remote.waited_s if self.remote is not None else 0.0

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count what crosses the wire in here under `phase`."""
        if self.remote is None:
            yield
            return
        before, self.remote.phase = self.remote.phase, phase
        try:
            yield
        finally:
            self.remote.phase = before

    def compare_counts(self, timeout_s: float) -> Agreement | None:
        """Both sides' byte counts; None without a line."""
        return self.link.compare_counts(timeout_s) if self.link is not None else None

    def close(self) -> None:
        """End the session, if there is one."""
        if self.link is not None:
            self.link.close()


def load_local(config: TrainConfig) -> EdgeModel:
    """The whole model in this process, with the placement of the method it stands for."""
    directory = resolve(_given(config.model, "--model"))
    model, found = load_whole(directory, DTYPES[config.dtype])
    cut = Cut.parse(_given(config.cut, "--cut"))
    cut.span(len(found.blocks))
    select_outputs(model)
    model.to(pick_device(config.device))
    name = directory.resolve().name
    return EdgeModel(model, found, cut, _tokenizer(directory), name, model_digest(directory), config.dtype)


def connect(config: TrainConfig, ledger: Ledger, progress: Progress, forward_only: bool = False) -> EdgeModel:
    """The ends from the server, and a span that runs on it; `forward_only` asks for no right to a backward.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    address = _given(config.server, "--server")
    credentials = _credentials(config, address)
    card = describe(address, credentials, ledger)
    cut, offer = choose_cut(card, config.cut)
    cache = cache_directory() / "bundles"
    directory = fetch_ends(address, credentials, offer, card.model_digest, cache, ledger, progress)
    model, found = load_ends(directory, cut, DTYPES[config.dtype])
    opening = pb.Open(
        protocol=PROTOCOL,
        session=uuid.uuid4().hex,
        bottom=cut.bottom,
        top=cut.top,
        model_digest=card.model_digest,
        codec_activation=config.codec,
        codec_gradient=config.gradient_codec,
        deterministic=config.deterministic,
        forward_only=forward_only,
    )
    link = Link(address, credentials, opening, ledger, card.limits, config.patience)
    remote = RemoteBackbone(link, ledger, config.codec, config.gradient_codec)
    watch_owner(found.owner)
    found.blocks[cut.bottom] = RemoteSpan(cut.bottom, found, remote, topmost=cut.top == 0)
    select_outputs(model)
    model.to(pick_device(config.device))
    tokenizer, limit = _tokenizer(directory), card.limits.row_tokens
    name, digest = card.model, card.model_digest
    return EdgeModel(model, found, cut, tokenizer, name, digest, card.dtype, limit, link, remote)


def _credentials(config: TrainConfig, address: str) -> Credentials | None:
    if config.certs is not None:
        if config.insecure:
            raise UsageError("--certs and --insecure contradict each other; give one")
        return Credentials.load(config.certs)
    host, _ = split_address(address)
    if not config.insecure and not is_loopback(host):
        raise UsageError(
            f"{host} is another machine: give --certs DIR (the folder the model owner issued), or --insecure"
        )
    return None


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the model comes without a tokenizer that can be read: {str(error)[:120]}") from None
    return tokenizer


def _given(value: str | None, flag: str) -> str:
    if value is None:
        raise UsageError(f"{flag} is needed")
    return value


def device_of(edge: EdgeModel) -> torch.device:
    """Where the edge's part of the model is."""
    device: torch.device = next(edge.model.parameters()).device
    return device
