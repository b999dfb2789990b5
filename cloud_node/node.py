"""A node from its start to its stop: its model loaded, its faces served, what is under way finished.

Knows the order of things; what each is stands elsewhere.
"""

import asyncio
import logging
import signal
from functools import partial

import torch
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_node import status_server
from cloud_node.audit import Audit, AuditLog
from cloud_node.calls import Limits
from cloud_node.config import ServeConfig
from cloud_node.ends import ends_bundle
from cloud_node.engines import build_engine
from cloud_node.health_service import HealthService
from cloud_node.listening import require_free, serve, taken
from cloud_node.offsite import OffsiteService, limits_of, read_emulators
from cloud_node.policy.authority import Authority
from cloud_node.policy.ranges import largest_values
from cloud_node.revoked import Revoked
from cloud_node.rounds import RoundService
from cloud_node.service import BackboneService, Model
from cloud_node.status import Status
from cloud_node.submissions import Submissions
from emulator.outline import Outline
from emulator.tuned_ends import check
from isthmus import __version__, command
from isthmus.architectures import longest_row
from isthmus.errors import IsthmusError
from isthmus.ledger.memory import reset_peak
from isthmus.load import load_config, model_digest, resolve
from isthmus.trust.credentials import Credentials

log = logging.getLogger("cloud_node")

LOOK_S = 1.0
"""How soon a revocation ends what is open."""

SO_FAR_S = 600.0
"""What sessions use is written down so often, beside at their ends."""


def run(settings: ServeConfig) -> None:
    """Serve in this process until SIGTERM."""
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
        offsite = build_offsite(settings, service.model, key, service.authority)
        await _until_stopped(settings, status, service, credentials, offsite)
    finally:
        service.stop()
        _tell(service.audit, "stop")
        service.audit.close()
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
        rounds = build_rounds(settings, service, credentials)
        further = (offsite.handlers(), rounds.handlers(), HealthService(service).handlers())
        server, port = await serve(service, settings.listen, credentials, *further)
    except OSError:  # taken since `require_free` looked
        raise taken(settings.listen, "--listen") from None
    status.service = service
    _tell(service.audit, "start")
    stopped = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
    if credentials is None:
        log.warning("serving in plaintext: anyone who reaches this port can use the model and read what is sent")
    card = service.describe()
    log.info("serving cuts %s in %s on %s", ", ".join(map(str, card.cuts)), card.dtype, card.device)
    log.info("%s", offsite.in_words())
    log.info("%s", service.authority.now.in_words())
    typer.echo(f"cloud_node: ready on {settings.listen.rpartition(':')[0]}:{port}")
    following = service.authority.now.follow(service.enforce)
    beside = (_tell_so_far(service), _look_at_certificates(service, status, credentials), following)
    tasks = [asyncio.create_task(each) for each in beside]
    await stopped.wait()
    for task in tasks:
        task.cancel()
    log.info("stopping: finishing what is under way")
    await service.drain(settings.grace)
    await server.stop(1.0)


def _tell(audit: Audit, action: str) -> None:
    """Write that the node starts or stops, and say where the audit log stands, for whoever keeps that elsewhere."""
    audit.record(action, "node", version=__version__)
    if audit.end is not None:
        log.info("audit log: line %d has the hash %s", audit.end.number, audit.end.hash)


async def _tell_so_far(service: BackboneService) -> None:
    while True:
        await asyncio.sleep(SO_FAR_S)
        service.tell_so_far()


async def _look_at_certificates(service: BackboneService, status: Status, credentials: Credentials | None) -> None:
    """Take up what changes in the server's folder: new sessions see it by themselves."""
    while credentials is not None:
        await asyncio.sleep(LOOK_S)
        try:
            service.end_revoked()
            credentials = credentials.fresh()
            status.certificate_until = credentials.expires()
        except (OSError, IsthmusError) as error:
            log.warning("the server's certificates cannot be looked at (%s); trying again", error)


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
    audit = AuditLog(settings.audit) if settings.audit is not None else Audit()
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
    largest = partial(largest_values, directory, settings.cuts)
    authority = Authority(settings.policy, (model.name, digest), engine.describe().hidden_size, largest)
    limits, revoked = Limits(row_tokens=longest), Revoked(settings.certs)
    return BackboneService(engine, model, limits, authority=authority, audit=audit, revoked=revoked)


def build_rounds(settings: ServeConfig, service: BackboneService, credentials: Credentials | None) -> RoundService:
    """Make ready to hold rounds of many edges."""
    digest, kept = service.model.digest, settings.rounds
    return RoundService(kept, credentials, digest, service.authority, service.audit, settings.round_wait)


def build_offsite(
    settings: ServeConfig, model: Model, key: Ed25519PrivateKey | None, authority: Authority | None = None
) -> OffsiteService:
    """Verify the emulators, and make ready to take adapters in."""
    publisher = key.public_key() if key is not None else None
    offered = read_emulators(settings.emulators, model, publisher) if settings.emulators is not None else []
    if settings.submissions is None:
        return OffsiteService(offered, None, authority)
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
        authority,
    )
