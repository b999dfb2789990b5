"""Using a run that is done: score its adapter, or continue a prompt with it.

Knows run directories and how their model is put together again; trains nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console

from edge_client.assemble import EdgeModel, assembled, device_of
from edge_client.config import PICKING, TrainConfig
from edge_client.generation import WHOLE_TEXT_AGAIN, continued
from edge_client.outcome import score_block
from edge_client.runs import RunDirectory
from edge_client.taking_part import park, sites_of
from edge_client.tuning import Tuning, attach, load_adapter
from isthmus.errors import RunError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport, Score
from isthmus.settings import validated
from isthmus.training.data import read_examples
from isthmus.training.progress import meter
from isthmus.training.scoring import score
from isthmus.trust.credentials import Credentials

SpanKind = Literal["remote", "local"] | None


def evaluate(
    run: Path,
    data: Path,
    span: SpanKind,
    server: str | None,
    certs: Path | None,
    model: str | None,
    console: Console,
) -> tuple[Score, dict[str, Any]]:
    """Score a run's adapter on rows; returns the scores, and rows and bytes spent."""
    ledger = Ledger()
    with _reassembled(run, span, server, certs, model, ledger, console) as (config, edge, tuning):
        rows = read_examples(data, edge.tokenizer, edge.longest(config.max_length)).examples
        with edge.phase("eval"), meter(console, "evaluate", len(rows)) as progress:
            scores = score(
                tuning.model,
                rows,
                config.eval_batch_size,
                device_of(edge),
                lambda done, total: progress.update(len(rows) * done // total),
            )
    spent = {f"{way}_bytes": int(ledger.total("eval", f"{way}_bytes")) for way in ("up", "down")}
    return score_block(scores), {"rows": scores.rows, **spent}


def continue_prompt(
    run: Path,
    prompt: str,
    new_tokens: int,
    span: SpanKind,
    server: str | None,
    certs: Path | None,
    model: str | None,
    console: Console,
) -> str:
    """The text that a run's model adds to a prompt."""
    if not prompt:
        raise UsageError("--prompt is empty; give some text to continue")
    with (
        _reassembled(run, span, server, certs, model, Ledger(), console) as (_, edge, tuning),
        edge.phase("generate"),
    ):
        if tuning.side is not None:
            console.print(WHOLE_TEXT_AGAIN)
        return continued(edge, tuning, prompt, new_tokens)


@contextmanager
def _reassembled(
    run: Path,
    span: SpanKind,
    server: str | None,
    certs: Path | None,
    model: str | None,
    ledger: Ledger,
    console: Console,
) -> Iterator[tuple[TrainConfig, EdgeModel, Tuning]]:
    directory = RunDirectory(run)
    config, report = directory.config(), RunReport.load(run)
    if not directory.adapter.is_dir():
        raise RunError(f"{run} has no adapter yet; let the run finish, or `edge_client train --resume --out {run}`")
    kind = span or ("local" if config.method == "local" else "remote")
    changed: dict[str, Any] = {"cut": report.cut}
    if kind == "local" and not (model or config.model):
        raise UsageError("--span local needs --model DIR_OR_ID, the whole model")
    if kind == "local":
        changed |= {"method": "local", "server": None, "model": model or config.model}
        changed |= {name: TrainConfig.model_fields[name].default for name in ("kr_active", *PICKING)}
    else:
        method = "side" if config.peft == "side" else "dlora" if config.in_span else "split"
        if config.method == "local":  # which takes no notice of these
            changed |= {"cache": None, "codec_gradient": None}
        changed |= {"method": method, "model": None, "server": server or config.server, "certs": certs or config.certs}
    config = validated(TrainConfig, {**config.model_dump(), **changed})
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with assembled(config, ledger, console, forward_only=True) as edge:
        if edge.digest != report.model_digest:
            raise RunError(f"{run} was trained on another model than the one at hand; use the run's own")
        tuning = attach(edge.model, edge.found, edge.cut, config.placement)
        load_adapter(tuning, directory.adapter, _signer(config))
        if edge.adapters is not None:
            edge.adapters.attached()
            alive = _alive(report, tuning)
            edge.adapters.active = sites_of(edge.adapters, alive)
            with edge.phase("eval"):
                park(edge, tuning, tuning.alive - alive)
        yield config, edge, tuning


def _alive(report: RunReport, tuning: Tuning) -> frozenset[str]:
    """The ports that were alive at the run's end; values of others are in the adapter only where they were parked."""
    ports = report.ports
    if ports is None or ports.kill_revive is None or not ports.kill_revive.left_edge:
        return tuning.alive
    return frozenset(ports.ports[at].name for at in ports.kill_revive.decisions[-1].alive)


def _signer(config: TrainConfig) -> Ed25519PublicKey | None:
    """The key that this edge signs with; None where it has no identity, and its bundles prove nothing."""
    return Credentials.load(config.certs).signing_key().public_key() if config.certs is not None else None
