"""The edge model put together: the ends with a span in their middle, or the whole model for `local`.

Knows which pieces make a model that can be called; trains nothing. The trainer never learns what the span is.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from edge_client.cache import Origin, OutputCache
from edge_client.cached import Below, CachedSpan, Outputs, Spared
from edge_client.config import TrainConfig
from edge_client.link import Agreement, Link
from edge_client.passes import RemoteBackbone
from edge_client.port_adapters import PortAdapters, graft
from edge_client.remote import RemoteSpan
from edge_client.server import choose_cut, describe, describe_or_recall, fetch_ends
from edge_client.side import check_shape
from edge_client.tuning import span_targets
from isthmus import PROTOCOL
from isthmus.blocks import BlockList, watch_owner
from isthmus.command import cache_directory
from isthmus.cut import Cut
from isthmus.errors import UsageError
from isthmus.ledger.record import Ledger, Phase
from isthmus.linears import linears_of
from isthmus.load import DTYPES, load_ends, load_whole, model_digest, outline, resolve
from isthmus.ports import LORA, Port, every
from isthmus.settings import pick_device, runtime
from isthmus.training.outputs import select_outputs
from isthmus.training.progress import meter
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
    outputs: Outputs | None = None
    adapters: PortAdapters | None = None

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

    def longest(self, asked: int) -> int:
        """Tokens that a row may have: `asked`, or what the server takes if that is fewer."""
        return min(asked, self.row_tokens or asked)

    def cached_outputs(self) -> Outputs:
        """The outputs of a span that stands above nothing that trains.

        Raises:
            UsageError: there are none.
        """
        if self.outputs is None:
            raise UsageError("this edge model keeps no outputs; connect with --train top or --method side")
        return self.outputs

    def compare_counts(self, timeout_s: float) -> Agreement | None:
        """Both sides' byte counts; None where nothing was sent."""
        return self.link.compare_counts(timeout_s) if self.link is not None and self.link.opened else None

    def close(self) -> None:
        """End the session, if there is one."""
        if self.link is not None:
            self.link.close()


@contextmanager
def assembled(config: TrainConfig, ledger: Ledger, console: Console, forward_only: bool = False) -> Iterator[EdgeModel]:
    """The edge model that `config` asks for, while in here; what is fetched for it is shown on `console`.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    if config.method == "local":
        yield load_local(config)
        return
    with meter(console, "fetch the ends", 100) as fetching:
        edge = connect(config, ledger, lambda done, total: fetching.update(100 * done // max(1, total)), forward_only)
    try:
        yield edge
    finally:
        edge.close()


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

    Where nothing below the span's end trains, its outputs come from a cache, and the server is needed for what is
    not in there.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    address = _given(config.server, "--server")
    credentials = _credentials(config, address)
    card, present = _describe(config, address, credentials, ledger)
    cut, offer = choose_cut(card, config.cut)
    bundles = cache_directory() / "bundles"
    directory = fetch_ends(address, credentials, offer, card.model_digest, bundles, ledger, progress)
    model, found = load_ends(directory, cut, DTYPES[config.dtype])
    model.to(pick_device(config.device))
    linears = linears_of(*outline(directory), cut.span(card.blocks)) if config.in_span else {}
    graft(found, linears, model.dtype, model.device)
    ports = _ports(config, cut, card, model, found)
    opening = _opening(config, cut, card, ports, forward_only or config.forward_only)
    link = Link(address, credentials, opening, ledger, card.limits, config.patience, config.pace)
    remote = RemoteBackbone(link, ledger, config.codec, config.gradient_codec, config.port_codec)
    adapters = PortAdapters(found, ports, linears, ledger) if config.in_span else None
    outputs = None
    if config.forward_only:
        widths = (card.hidden_size, sum(port.width for port in ports)) if ports else (card.hidden_size,)
        cache = _cache(config, _origin(config, cut, card, ports))
        below = Below(model, found, cut)
        outputs = Outputs(below, remote, cache, ledger, widths, card.limits.call_bytes, alone=config.deterministic)
    _place(found, cut, remote, outputs, ports, adapters)
    select_outputs(model)
    tokenizer, limit = _tokenizer(directory), card.limits.row_tokens
    if present:
        link.open()
    name, digest = card.model, card.model_digest
    return EdgeModel(model, found, cut, tokenizer, name, digest, card.dtype, limit, link, remote, outputs, adapters)


def _describe(
    config: TrainConfig, address: str, credentials: Credentials | None, ledger: Ledger
) -> tuple[pb.ModelCard, bool]:
    if config.forward_only:
        return describe_or_recall(address, credentials, ledger, cache_directory() / "cards")
    return describe(address, credentials, ledger), True


def _ports(
    config: TrainConfig, cut: Cut, card: pb.ModelCard, model: PreTrainedModel, found: BlockList
) -> tuple[Port, ...]:
    if config.in_span:
        sites = span_targets(model, found, cut, config.targets)
        return tuple(Port(block, module=module, kind=LORA) for block, module in sites)
    side = config.placement.side
    if side is None:
        return ()
    check_shape(side, card.hidden_size)
    return every(side.every, cut, card.blocks, side.width)


def _opening(config: TrainConfig, cut: Cut, card: pb.ModelCard, ports: tuple[Port, ...], forward_only: bool) -> pb.Open:
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


def _cache(config: TrainConfig, origin: Origin) -> OutputCache:
    return OutputCache(config.cache or cache_directory() / "outputs", config.cache_limit, origin)


def _origin(config: TrainConfig, cut: Cut, card: pb.ModelCard, ports: tuple[Port, ...]) -> Origin:
    exact = config.deterministic
    return Origin(
        model_digest=card.model_digest,
        cut=str(cut),
        codec=config.codec,
        codec_port=config.port_codec if ports else "",
        edge_dtype=config.dtype,
        span_dtype=card.dtype,
        ports=tuple(f"{port.block}:{port.width}" for port in ports),
        deterministic=exact,
        edge_runtime=runtime(str(pick_device(config.device))) if exact else "",
        span_runtime=card.runtime if exact else "",
    )


def _place(
    found: BlockList,
    cut: Cut,
    remote: RemoteBackbone,
    outputs: Outputs | None,
    ports: tuple[Port, ...],
    adapters: PortAdapters | None,
) -> None:
    """Put the span into the model."""
    topmost = cut.top == 0
    watch_owner(found.owner)
    span = RemoteSpan(cut.bottom, found, remote, topmost, adapters)
    if adapters is not None:
        for name, grafted in found.blocks[cut.bottom].named_children():
            span.add_module(name, grafted)
    if outputs is None:
        found.blocks[cut.bottom] = span
        return
    for number in range(cut.bottom):
        found.blocks[number] = Spared(found.blocks[number], found)
    cached = CachedSpan(span, found, outputs, ports)
    cached.watch(found.owner, topmost)
    found.blocks[cut.bottom] = cached


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
