"""Using a run that is done: put its model together again, score its adapter, or continue a prompt with it.

Knows run directories and what may stand between a model's ends; trains nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from edge_client.adapter_folder import load_adapter
from edge_client.assemble import assembled
from edge_client.attaching import attach
from edge_client.config import PICKING, TrainConfig
from edge_client.counting import Counting
from edge_client.edge_flops import count_edge_flops
from edge_client.edge_model import EdgeModel
from edge_client.generation import WHOLE_TEXT_AGAIN, continued
from edge_client.opening import signer_of
from edge_client.outcome import score_of
from edge_client.runs import RunDirectory, sha256
from edge_client.taking_part import park, sites_of
from edge_client.tuning import Tuning
from isthmus.errors import RunError, UsageError
from isthmus.ledger.memory import peak_bytes, reset_peak
from isthmus.ledger.record import Ledger
from isthmus.report.evaluated import Evaluated, append
from isthmus.report.schema import RunReport
from isthmus.report.stages import stage_of
from isthmus.settings import validated
from isthmus.training.data import read_examples
from isthmus.training.progress import meter

SpanKind = Literal["remote", "emulated", "local"]


@dataclass(frozen=True)
class Using:
    """How a run's model is put together again.

    Attributes:
        span: what stands between the ends; None: what stood there in the run.
        server, certs: where the true span is, and this edge's identity; None: the run's.
        model: the whole model, for `local`.
        untouched: leave the run's adapter out.
        insecure: speak to another machine in plaintext. It stands in place of the run's certificates, and `certs` in
            place of the run's plaintext.
        threads: CPU threads; None: the run's.
        key_file: opens a sealed run; None: the run's, or a passphrase.
    """

    span: SpanKind | None = None
    server: str | None = None
    certs: Path | None = None
    model: str | None = None
    untouched: bool = False
    insecure: bool = False
    threads: int | None = None
    key_file: Path | None = None


def evaluate(run: Path, data: Path, using: Using, console: Console) -> Evaluated:
    """Score a run's adapter on rows, and note the scores in the run's directory.

    Raises:
        RunError: the scores are not finite or cannot be noted, or the run has no adapter or is of another model.
        IsthmusError: whatever else stands in the way, each with its remedy.
    """
    ledger = Ledger()
    with reassembled(run, using, ledger, console) as (config, edge, tuning):
        adapter = adapter_used(run, using)
        rows = read_examples(
            data, edge.tokenizer, edge.longest(config.max_length, tuning.virtual_tokens), config.labels
        ).examples
        began = time.perf_counter()
        counting = Counting(edge, tuning, ledger, lambda: count_edge_flops(edge, tuning))
        reset_peak()
        with meter(console, "evaluate", len(rows)) as progress:
            scores = counting.score(
                "eval", rows, config.eval_batch_size, lambda done, total: progress.update(len(rows) * done // total)
            )
        seconds = time.perf_counter() - began
        ledger.peak("edge_peak_memory_bytes", peak_bytes() or 0, "eval")
    found = Evaluated(
        span=span_kind(config),
        emulator=edge.standin.id if edge.standin is not None else None,
        untouched=using.untouched,
        adapter=adapter,
        data=sha256(data),
        rows=scores.rows,
        score=score_of(scores),
        up_bytes=int(ledger.total("eval", "up_bytes")),
        down_bytes=int(ledger.total("eval", "down_bytes")),
        fetched_bytes=int(ledger.total("fetch", "up_bytes") + ledger.total("fetch", "down_bytes")),
        tokens_per_s=scores.real_tokens / seconds,
        cost=stage_of(ledger, "eval", seconds=seconds),
    )
    append(run, found, scores)
    return found


@dataclass(frozen=True)
class Continuation:
    """The text that was added to a prompt, and the bytes that crossed for it."""

    text: str
    up_bytes: int
    down_bytes: int


def continue_prompt(run: Path, prompt: str, new_tokens: int, using: Using, console: Console) -> Continuation:
    """What a run's model adds to a prompt.

    Raises:
        IsthmusError: as `evaluate`; UsageError also where the prompt is empty.
    """
    if not prompt:
        raise UsageError("--prompt is empty; give some text to continue")
    ledger = Ledger()
    with reassembled(run, using, ledger, console) as (_, edge, tuning), edge.phase("generate"):
        if tuning.side is not None:
            console.print(WHOLE_TEXT_AGAIN)
        text = continued(edge, tuning, prompt, new_tokens)
    return Continuation(text, *(int(ledger.total("generate", figure)) for figure in ("up_bytes", "down_bytes")))


@contextmanager
def reassembled(
    run: Path, using: Using, ledger: Ledger, console: Console
) -> Iterator[tuple[TrainConfig, EdgeModel, Tuning]]:
    """A run's settings, as `using` changes them, and its model put together again, while in here.

    Raises:
        RunError: the run has no adapter, or is of another model or emulator.
        IsthmusError: whatever else stands in the way, each with its remedy.
    """
    directory, report = unlocked(run, using), RunReport.load(run)
    adapter = directory.trained()
    config = _changed(directory.config(), report, using)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with assembled(config, ledger, console, forward_only=True) as edge:
        if edge.digest != report.model_digest:
            raise RunError(f"{run} was trained on another model than the one at hand; use the run's own")
        if edge.standin is not None and report.offsite is not None and edge.standin.id != report.offsite.emulator:
            raise RunError(f"{run} was tuned on another emulator than the one in {config.emulator}; use the run's own")
        tuning = attach(edge.model, edge.found, edge.cut, config.placement)
        if not using.untouched:
            load_adapter(tuning, adapter, signer_of(directory.config()), directory.seal)
        if edge.adapters is not None:
            edge.adapters.attached()
            alive = _alive(report, tuning)
            edge.adapters.active = sites_of(edge.adapters, alive)
            with edge.phase("eval"):
                park(edge, tuning, tuning.alive - alive)
                edge.adapters.leave()
        yield config, edge, tuning


def span_kind(config: TrainConfig) -> SpanKind:
    """What stands between the ends of a model with these settings."""
    return "local" if config.method == "local" else "emulated" if config.method == "offsite" else "remote"


def adapter_used(run: Path, using: Using) -> str | None:
    """SHA-256 in hex of the run's adapter; None where it is left out.

    Raises:
        RunError: there is none yet.
    """
    directory = unlocked(run, using)
    directory.trained()
    return None if using.untouched else directory.adapter_digest()


def unlocked(run: Path, using: Using) -> RunDirectory:
    """A run's directory with its seal open, if it has one.

    Raises:
        IsthmusError: as `RunDirectory.unlock`.
    """
    directory = RunDirectory(run)
    directory.unlock(using.key_file or directory.config().key_file)
    return directory


def _changed(config: TrainConfig, report: RunReport, using: Using) -> TrainConfig:
    """The run's settings with those that put another span into its model."""
    kind = using.span or span_kind(config)
    changed: dict[str, Any] = {"cut": report.cut, "from_run": None, "watch": 0}
    changed["threads"] = using.threads or config.threads
    changed["key_file"] = (using.key_file or config.key_file) if config.seal else None
    changed |= config.trusting(using.certs, using.insecure)
    if kind == "emulated":
        changed |= _emulated(config, report, using)
    elif kind == "local":
        model = using.model or config.model
        if not model:
            raise UsageError("--span local needs --model DIR_OR_ID, the whole model")
        changed |= {"method": "local", "server": None, "model": model, "emulator": None}
        changed |= {name: TrainConfig.model_fields[name].default for name in ("kr_active", *PICKING)}
    else:
        method = "side" if config.peft == "side" else "dlora" if config.in_span else "split"
        if config.method in ("local", "offsite"):  # which take no notice of these
            changed |= {"cache": None, "codec_gradient": None}
        server = using.server or config.server
        if server is None:
            why = "the run was --method local" if config.method == "local" else "its emulator was a folder"
            raise UsageError(f"--span remote needs --server HOST:PORT: the run knows none, since {why}")
        changed |= {"method": method, "model": None, "emulator": None, "server": server}
    return validated(TrainConfig, {**config.model_dump(), **changed})


def _emulated(config: TrainConfig, report: RunReport, using: Using) -> dict[str, Any]:
    """Settings for the emulator that the run was tuned on, which needs a server only if it is not here any more."""
    if report.offsite is None:
        raise UsageError("--span emulated goes with a run of --method offsite; this one is none")
    if config.emulator_folder is not None:
        return {"server": None}
    return {"server": using.server or config.server, "emulator": report.offsite.emulator}


def _alive(report: RunReport, tuning: Tuning) -> frozenset[str]:
    """The ports that were alive at the run's end; values of others are in the adapter only where they were parked."""
    ports = report.ports
    if ports is None or ports.kill_revive is None or not ports.kill_revive.left_edge:
        return tuning.alive
    return frozenset(ports.ports[at].name for at in ports.kill_revive.decisions[-1].alive)
