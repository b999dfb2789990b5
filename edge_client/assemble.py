"""The edge model put together: the ends with a span in their middle, or the whole model for `local`.

Knows which pieces make a model that can be called; trains nothing. The trainer never learns what the span is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edge_client.cache import Origin, OutputCache
from edge_client.cached import Below, Outputs
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.link import Link
from edge_client.middle import ports_of, put_in_the_middle, span_adapters
from edge_client.offsite import load_offsite
from edge_client.opening import credentials_for, opening_of, required
from edge_client.passes import RemoteBackbone
from edge_client.port_adapters import graft
from edge_client.secrets_given import sealed_cache, to_seal_with
from edge_client.server import choose_cut, describe, describe_or_recall, fetch_ends
from isthmus.architectures import longest_row
from isthmus.command import cache_directory
from isthmus.cut import Cut
from isthmus.device import pick_device, runtime
from isthmus.ledger.record import Ledger
from isthmus.linears import linears_of
from isthmus.load import DTYPES, load_config, load_ends, load_tokenizer, load_whole, model_digest, outline, resolve
from isthmus.ports import Port
from isthmus.report.units import size
from isthmus.training.data import padding_of
from isthmus.training.outputs import select_outputs
from isthmus.training.progress import meter
from isthmus.trust.cache_seals import seal_of
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

Progress = Callable[[int, int], None]


@contextmanager
def assembled(
    config: TrainConfig,
    ledger: Ledger,
    console: Console,
    forward_only: bool = False,
    emulator: str | None = None,
) -> Iterator[EdgeModel]:
    """The edge model that `config` asks for, while in here; what is fetched for it is shown on `console`.

    Args:
        config: of the run.
        ledger: counts what crosses.
        console: where progress is shown.
        forward_only: ask for no right to a backward.
        emulator: id of the bundle that a resumed run began with.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    if config.method == "local":
        yield load_local(config)
        return
    offsite = config.method == "offsite"
    with meter(console, "fetch the emulator, %" if offsite else "fetch the ends, %", 100) as fetching:

        def progress(done: int, total: int) -> None:
            fetching.update(100 * done // max(1, total), f"{size(done)} of {size(total)}")

        if offsite:
            edge = load_offsite(config, ledger, progress, emulator)
        else:
            edge = connect(config, ledger, progress, forward_only)
    try:
        yield edge
    finally:
        edge.close()


def load_local(config: TrainConfig) -> EdgeModel:
    """The whole model in this process, with the placement of the method it stands for."""
    directory = resolve(required(config.model, "--model"))
    model, found = load_whole(directory, DTYPES[config.dtype], config.head)
    cut = Cut.parse(required(config.cut, "--cut"))
    cut.span(len(found.blocks))
    select_outputs(model)
    model.to(pick_device(config.device))
    name = directory.resolve().name
    tokenizer, limit = _tokenizer(directory, model, config), longest_row(load_config(directory))
    return EdgeModel(model, found, cut, tokenizer, name, model_digest(directory), config.dtype, limit)


def connect(config: TrainConfig, ledger: Ledger, progress: Progress, forward_only: bool = False) -> EdgeModel:
    """The ends from the server, and a span that runs on it; `forward_only` asks for no right to a backward.

    Where nothing below the span's end trains, its outputs come from a cache, and the server is needed for what is
    not in there.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    address = required(config.server, "--server")
    credentials = credentials_for(config, address)
    card, present = _describe(config, address, credentials, ledger)
    cut, offer = choose_cut(card, config.cut)
    bundles = cache_directory() / "bundles"
    directory = fetch_ends(address, credentials, offer, card.model_digest, bundles, ledger, progress)
    model, found = load_ends(directory, cut, DTYPES[config.dtype], config.head)
    model.to(pick_device(config.device))
    linears = linears_of(*outline(directory), cut.span(card.blocks)) if config.in_span else {}
    graft(found, linears, model.dtype, model.device)
    ports = ports_of(config, cut, model, found)
    opening = opening_of(config, cut, card, ports, forward_only or config.forward_only)
    link = Link(address, credentials, opening, ledger, card.limits, config.patience, config.pace)
    remote = RemoteBackbone(link, ledger, config.codec, config.gradient_codec, config.port_codec)
    adapters = span_adapters(config, found, ports, linears, ledger, remote)
    outputs = None
    if config.forward_only:
        widths = (card.hidden_size, sum(port.width for port in ports)) if ports else (card.hidden_size,)
        cache = _cache(config, _origin(config, cut, card, ports))
        below = Below(model, found, cut)
        outputs = Outputs(below, remote, cache, ledger, widths, card.limits.call_bytes, alone=config.deterministic)
    put_in_the_middle(found, cut, remote, outputs, ports, adapters)
    select_outputs(model)
    tokenizer, limit = _tokenizer(directory, model, config), card.limits.row_tokens
    if present:
        link.open()
    name, digest = card.model, card.model_digest
    return EdgeModel(model, found, cut, tokenizer, name, digest, card.dtype, limit, link, remote, outputs, adapters)


def _tokenizer(directory: Path, model: PreTrainedModel, config: TrainConfig) -> PreTrainedTokenizerBase | None:
    """None for a model of pictures. A classifier that picks the last token of a row knows it by what stands behind."""
    if config.labels is not None:
        model.config.id2label = dict(enumerate(map(str, config.labels)))
        model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    if model.main_input_name == "pixel_values":
        return None
    tokenizer = load_tokenizer(directory)
    if config.labels is not None:
        model.config.get_text_config().pad_token_id = padding_of(tokenizer)
    return tokenizer


def _describe(
    config: TrainConfig, address: str, credentials: Credentials | None, ledger: Ledger
) -> tuple[pb.ModelCard, bool]:
    if config.forward_only:
        return describe_or_recall(address, credentials, ledger, cache_directory() / "cards")
    return describe(address, credentials, ledger), True


def _cache(config: TrainConfig, origin: Origin) -> OutputCache:
    if not config.seal:
        return OutputCache(config.cache or cache_directory() / "outputs", config.cache_limit, origin)
    directory = sealed_cache(config)
    return OutputCache(directory, config.cache_limit, origin, seal_of(directory, to_seal_with(config.key_file)))


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
