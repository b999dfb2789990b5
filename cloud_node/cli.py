"""The command line of the model owner: `cloud_node serve`, `certs`, `models`, `emulator`, `plug-in`, `merge`.

Knows flags and how to start and stop a node; everything else is called.
"""

import asyncio
import logging
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_node import certs, emulators, logs, merging, models, plugging, status_server
from cloud_node.calls import Limits
from cloud_node.config import ServeConfig
from cloud_node.ends import ends_bundle
from cloud_node.engines import build_engine, supervised
from cloud_node.listening import require_free, serve, taken
from cloud_node.offsite import OffsiteService, limits_of, read_emulators
from cloud_node.service import BackboneService, Model
from cloud_node.status import Status
from cloud_node.submissions import Submissions
from emulator.outline import Outline
from emulator.tuned_ends import check
from isthmus import command
from isthmus.architectures import longest_row
from isthmus.ledger.memory import reset_peak
from isthmus.load import load_config, model_digest, resolve
from isthmus.settings import read_settings
from isthmus.trust.credentials import Credentials

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(certs.app, name="certs")
app.add_typer(models.app, name="models")
app.add_typer(emulators.app, name="emulator")
app.command("plug-in")(plugging.plug_in_command)
app.command("merge")(merging.merge_command)
log = logging.getLogger("cloud_node")


@app.callback()
def _root() -> None:
    """Hold a model's frozen backbone and run its span for edge clients."""


@app.command("serve")
def serve_command(
    model: Annotated[str | None, typer.Option(help="directory or Hugging Face id of the model")] = None,
    cut: Annotated[list[str] | None, typer.Option(help="cut offered, bottom:top; may be repeated [2:2]")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 takes a free one [127.0.0.1:7070]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [float32]")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="hold the span's weights as int8 or nf4, with pip install 'isthmus[quantize]'")
    ] = None,
    certs_dir: Annotated[Path | None, typer.Option("--certs", help="folder of the server's certificate")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="serve in plaintext off loopback")] = None,
    activation_budget: Annotated[int | None, typer.Option(help="bytes kept for backward passes [4 GiB]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for computing [all cores]")] = None,
    grace: Annotated[float | None, typer.Option(help="seconds to finish requests when stopped [30]")] = None,
    emulators: Annotated[Path | None, typer.Option(help="folder of an emulator, or of several, to offer")] = None,
    submissions: Annotated[Path | None, typer.Option(help="folder to take edges' adapters into")] = None,
    signers: Annotated[
        Path | None,
        typer.Option(help="folder of edges' signing keys, such as certs/authority/issued; needed with --certs"),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="inprocess, or ray with pip install 'isthmus[ray]' [inprocess]")
    ] = None,
    stages: Annotated[int | None, typer.Option(help="ray: processes that share the span's blocks [1]")] = None,
    replicas: Annotated[str | None, typer.Option(help="ray: copies of the span, MIN:MAX [1:1]")] = None,
    address: Annotated[str | None, typer.Option(help="ray: cluster to join, or auto; else a local one")] = None,
    status_port: Annotated[int | None, typer.Option(help="serve the status page and metrics at this port")] = None,
    status_host: Annotated[
        str | None, typer.Option(help="interface of the status page, whatever --listen is [127.0.0.1]")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json [text]")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info or warning, of our own lines [info]")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same names as the flags")] = None,
) -> None:
    """Serve a model's span until SIGTERM.

    Example: cloud_node serve --model models/smollm2-135m --cut 2:2 --certs certs/server --dtype bfloat16
    """
    flags = {
        "model": model,
        "cut": cut or None,
        "listen": listen,
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "certs": certs_dir,
        "insecure": insecure,
        "activation_budget": activation_budget,
        "threads": threads,
        "grace": grace,
        "emulators": emulators,
        "submissions": submissions,
        "signers": signers,
        "engine": engine,
        "stages": stages,
        "replicas": replicas,
        "address": address,
        "status_port": status_port,
        "status_host": status_host,
        "log_format": log_format,
        "log_level": log_level,
    }
    settings = read_settings(ServeConfig, config, flags)
    logs.configure(settings.log_format, settings.log_level)
    code = supervised(settings)
    if code is not None:
        raise typer.Exit(code)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    asyncio.run(_serve(settings))


async def _serve(settings: ServeConfig) -> None:
    credentials = Credentials.load(settings.certs) if settings.certs is not None else None
    key = credentials.signing_key() if credentials is not None else None
    require_free(settings.listen, "--listen")  # before weights are loaded, or replicas of another node are taken away
    status = serve_status(settings, credentials)
    service = await asyncio.to_thread(build_service, settings, key)  # Serve refuses to be waited for inside a loop
    try:
        offsite = build_offsite(settings, service.model, key)
        await _until_stopped(settings, status, service, credentials, offsite)
    finally:
        service.stop()
    typer.echo("cloud_node: stopped")


async def _until_stopped(
    settings: ServeConfig,
    status: Status,
    service: BackboneService,
    credentials: Credentials | None,
    offsite: OffsiteService,
) -> None:
    reset_peak()
    try:
        server, port = await serve(service, settings.listen, credentials, offsite.handlers())
    except OSError:  # taken since `require_free` looked
        raise taken(settings.listen, "--listen") from None
    status.service = service
    stopped = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
    if credentials is None:
        log.warning("serving in plaintext: anyone who reaches this port can use the model and read what is sent")
    card = service.describe()
    log.info("serving cuts %s in %s on %s", ", ".join(map(str, card.cuts)), card.dtype, card.device)
    log.info("%s", offsite.in_words())
    typer.echo(f"cloud_node: ready on {settings.listen.rpartition(':')[0]}:{port}")
    await stopped.wait()
    log.info("stopping: finishing what is under way")
    await service.drain(settings.grace)
    await server.stop(1.0)


def serve_status(settings: ServeConfig, credentials: Credentials | None) -> Status:
    """Serve the status page if it has a port: on loopback unless told otherwise, whatever the node listens on.

    Returns:
        What is served there, of a node whose model is not loaded yet.
    """
    status = Status(credentials.expires() if credentials is not None else None)
    if settings.status_port is not None:
        status_server.start(status, settings.status_host or status_server.LOOPBACK, settings.status_port)
    return status


def build_service(settings: ServeConfig, key: Ed25519PrivateKey | None) -> BackboneService:
    """Load the span, make the bundles of its ends, and stand the service on them."""
    directory = resolve(settings.model)
    model_config = load_config(directory).get_text_config()
    digest = model_digest(directory)
    ends = {cut: ends_bundle(directory, digest, cut, key, command.cache_directory()) for cut in settings.cuts}
    engine = build_engine(settings, directory)
    model = Model(
        name=directory.resolve().name,
        digest=digest,
        config_json=(directory / "config.json").read_text(),
        blocks=model_config.num_hidden_layers,
        ends=ends,
    )
    longest = longest_row(load_config(directory)) or Limits.row_tokens
    return BackboneService(engine, model, Limits(row_tokens=longest))


def build_offsite(settings: ServeConfig, model: Model, key: Ed25519PrivateKey | None) -> OffsiteService:
    """Verify the emulators, and make ready to take adapters in."""
    publisher = key.public_key() if key is not None else None
    offered = read_emulators(settings.emulators, model, publisher) if settings.emulators is not None else []
    if settings.submissions is None:
        return OffsiteService(offered, None)
    limits, outline = limits_of(model, offered), Outline.of(resolve(settings.model), model.digest)
    if settings.certs is None:
        log.warning(
            "adapters are taken from anyone who reaches this port: without --certs nobody's signature is checked"
        )
    return OffsiteService(
        offered,
        Submissions(
            settings.submissions,
            model.digest,
            limits,
            settings.signers,
            lambda adapter: check(adapter, outline),
            resolve(settings.model),
        ),
    )


def main() -> None:
    """Entry point of the console command."""
    command.run(app, "cloud_node")


if __name__ == "__main__":
    main()
