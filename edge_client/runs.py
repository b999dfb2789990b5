"""A run's directory: its settings, metrics, ledger, checkpoints, scores, adapter and report.

Knows file names and who may write; knows nothing of what is trained.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from edge_client.config import PLACED, TrainConfig
from edge_client.sealed_adapter import is_sealed, sealed_digest
from edge_client.secrets_given import to_open
from isthmus.adapter_files import OWN_WEIGHTS, PEFT_WEIGHTS
from isthmus.durable import DRAFT, append_lines, write_whole
from isthmus.errors import RunError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.report.evaluated import FILE_NAME as EVALUATIONS_NAME
from isthmus.report.evaluated import SCORES_NAME, SCORES_SCHEMA, SUBMISSIONS_NAME
from isthmus.report.history import LEDGER_NAME, METRICS_NAME
from isthmus.report.schema import FILE_NAME, RunReport
from isthmus.settings import read_settings
from isthmus.trust.seal_keys import FILE_NAME as SEAL_NAME
from isthmus.trust.seal_keys import Secret, keep, open_seal
from isthmus.trust.sealing import Seal

if TYPE_CHECKING:
    from isthmus.training.scoring import Scores

log = logging.getLogger(__name__)

_LOCK: Final = ".lock"


class RunDirectory:
    """Where one run keeps everything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.seal: Seal | None = None  # what its files are sealed with, once it is open
        self.seal_file = path / SEAL_NAME
        self._config = path / "config.yaml"
        self._ledger = path / LEDGER_NAME
        self._metrics = path / METRICS_NAME
        self._scores = path / SCORES_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, made if need be; a second writer is refused.

        Raises:
            RunError: another process is writing, or the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}); choose another, or check the disk"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise RunError(f"another process is writing {self.path}; wait for it, or name another run") from None
        finally:
            os.close(handle)

    @property
    def in_use(self) -> bool:
        """Whether a process is writing here now."""
        try:
            handle = os.open(self.path / _LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def unlock(self, key_file: Path | None, ask: bool = True) -> None:
        """Open the seal of the run here, if it has one.

        Raises:
            UsageError: what opens it was not given, or there is nobody to ask, or nobody shall be asked.
            RunError: something else opens it, its file is gone, or there is no run.
            BundleError: its file is damaged.
        """
        if self.sealed:
            self.seal = open_seal(self.seal_file, to_open(self.seal_file, key_file, ask))

    @property
    def sealed(self) -> bool:
        """Whether the run here was sealed, even if its key is gone.

        Raises:
            RunError: there is no run.
        """
        return self.seal_file.exists() or self.config().seal or is_sealed(self.adapter)

    def own_files(self) -> list[Path]:
        """What a run leaves in its directory, as far as it is there; what tells that there is a run stands last."""
        drafts = [path for path in self.path.iterdir() if path.name.endswith(DRAFT)]
        others = (self._metrics, self._ledger, self._scores, self.path / EVALUATIONS_NAME, self.path / SUBMISSIONS_NAME)
        last = (self.path / FILE_NAME, self._config, self.path / _LOCK)
        named = (self.checkpoints, self.adapter, *drafts, *others, *last)
        return [path for path in named if os.path.lexists(path)]

    def begin(self, config: TrainConfig, secret: Secret | None = None) -> Ledger:
        """Start a new run here, sealed so that `secret` opens it if one is given.

        Raises:
            RunError: there is one already.
        """
        if any(path.exists() for path in (self.checkpoints, self.adapter, self.path / FILE_NAME)):
            raise RunError(f"{self.path} holds a run already; go on with --resume, or choose another --out")
        self._ledger.unlink(missing_ok=True)  # of a command that was refused before its run began
        with self._refusals():
            self.write_config(config)
            if secret is not None:
                self.seal = Seal.new()
                keep(self.seal, self.seal_file, secret)
        return Ledger(self._ledger)

    def write_config(self, config: TrainConfig) -> None:
        """Write config.yaml, whole or not at all.

        Raises:
            OSError: the disk refuses.
        """
        write_whole(self._config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())

    def resume(self, step: int) -> Ledger:
        """Go on with the run here from `step`: later metrics are dropped, what was spent stays in the ledger.

        Raises:
            RunError: the disk refuses, or the ledger is damaged.
        """
        for draft in self.path.glob(f"*.*.*{DRAFT}"):  # of a process that was killed
            draft.unlink(missing_ok=True)
        if self._metrics.exists():
            kept = self._metrics_until(step)
            with self._refusals():
                write_whole(self._metrics, "".join(f"{line}\n" for line in kept).encode())
        return self.ledger()

    def _metrics_until(self, step: int) -> list[str]:
        """The lines up to a step; a damaged one is dropped, with a warning unless a crash has torn the last."""
        lines = self._metrics.read_text(errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], start=1):
            if _step_of(line) == math.inf:
                log.warning("line %d of %s is damaged: it is dropped, the run itself is whole", number, self._metrics)
        return [line for line in lines if _step_of(line) <= step]

    def ledger(self) -> Ledger:
        """What was spent here so far, to which more may be added.

        Raises:
            RunError: a line of it is malformed, or it cannot be written.
        """
        return Ledger.resume(self._ledger) if self._ledger.exists() else Ledger(self._ledger)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn what the disk refuses in here into words."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}); free some space or mend its rights, and --resume"
            ) from None

    def config(self) -> TrainConfig:
        """The settings of the run here.

        Raises:
            RunError: there is no run.
        """
        if not self._config.is_file():
            raise RunError(f"{self.path} holds no run; check the path, or start one with `edge_client train`")
        try:
            return read_settings(TrainConfig, self._config, {})
        except UsageError as error:
            if str(self._config) in str(error):
                raise
            raise UsageError(f"{self._config}: {error}") from None

    def write_metrics(self, **figures: Any) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            RunError: the disk refuses.
        """
        with self._refusals():
            append_lines(self._metrics, json.dumps(figures) + "\n")

    def write_scores(self, before: "Scores | None", after: "Scores | None") -> None:
        """Write scores.json: each held-out row's figures, so that runs can be compared on the same rows.

        Raises:
            RunError: the disk refuses; what was there stays.
        """
        content = {"schema": SCORES_SCHEMA, "before": _per_row(before), "after": _per_row(after)}
        with self._refusals():
            write_whole(self._scores, (json.dumps(content) + "\n").encode())

    def placed(self) -> dict[str, Any]:
        """What trained here and where, as settings by name.

        Raises:
            RunError: the run has not ended, or cannot be read.
        """
        config, report = self.config(), RunReport.load(self.path)
        return {name: getattr(config, name) for name in PLACED} | {"cut": report.cut}

    def trained(self) -> Path:
        """The adapter's folder.

        Raises:
            RunError: there is none yet. One that is not the report's is warned of.
        """
        if not self.adapter.is_dir():
            raise RunError(
                f"{self.path} has no adapter yet; let the run finish, or `edge_client train --resume --out {self.path}`"
            )
        digest = self.adapter_digest()
        if digest is not None and (self.path / FILE_NAME).exists():
            noted = RunReport.load(self.path).adapter
            if noted is not None and noted != digest:
                log.warning(
                    "%s is not what %s was written of: it was changed, damaged, or is of a later step; "
                    "`edge_client train --resume --out %s` writes it again",
                    *(self.adapter, FILE_NAME, self.path),
                )
        return self.adapter

    def adapter_digest(self) -> str | None:
        """SHA-256 in hex of the adapter's tensors; None where there are none yet.

        Raises:
            BundleError: they are sealed, and damaged.
        """
        if self.seal is not None:
            return sealed_digest(self.adapter, self.seal)
        for name in (PEFT_WEIGHTS, OWN_WEIGHTS):
            if (self.adapter / name).is_file():
                return sha256(self.adapter / name)
        return None

    def stored_bytes(self) -> int:
        """Bytes of the adapter's files."""
        return sum(path.stat().st_size for path in self.adapter.iterdir()) if self.adapter.is_dir() else 0


def sha256(path: Path) -> str:
    """SHA-256 in hex of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _per_row(scores: "Scores | None") -> dict[str, Any] | None:
    if scores is None:
        return None
    return {"nats": scores.nats, "tokens": scores.tokens, "correct": scores.correct}


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
