"""Checkpoints: what a run needs to go on bit by bit as if it had never stopped.

Knows files, checksums and tensors by name; knows no model. A checkpoint is one safetensors file, written under a
temporary name, synced, and renamed; its name carries the checksum of its content, so a torn one is never trusted.
Where a run is sealed it is sealed on its way to the disk; what notices damage is then the seal.
"""

import hashlib
import json
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from isthmus.durable import DRAFT, write_whole
from isthmus.errors import BundleError, RunError
from isthmus.faults import CHECKPOINT
from isthmus.tensors_in_memory import read_tensors
from isthmus.trust.sealing import ENDING, Seal

log = logging.getLogger(__name__)

KEPT = 2
FORMAT = "isthmus-checkpoint/2"
_NAME = re.compile(rf"step-(\d{{8}})-([0-9a-f]{{16}})\.safetensors({re.escape(ENDING)})?")


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps: tensors by name, and facts that are JSON."""

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, seal: Seal | None = None) -> Path:
    """Write a checkpoint durably and drop all but it and the one before it.

    What stands there of the same or later steps was torn, or the run would have gone on from it: it goes too.

    Raises:
        OSError: the disk is full or the directory cannot be written; older checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    facts = {"format": FORMAT, "step": checkpoint.step, **checkpoint.facts}
    content = save(checkpoint.tensors, metadata={"facts": json.dumps(facts)})
    for draft in directory.glob(f"step-*{DRAFT}"):  # of a process that was killed: a directory has one writer
        draft.unlink(missing_ok=True)
    path = directory / f"step-{checkpoint.step:08d}-{_digest(content, seal)}.safetensors"
    if seal is None:
        write_whole(path, content, CHECKPOINT)
    else:
        path = path.with_name(path.name + ENDING)
        seal.write(path, _purpose(path), [content], CHECKPOINT)
    earlier = [old for old in _newest_first(directory) if old.name < f"step-{checkpoint.step:08d}"]
    for old in set(_newest_first(directory)) - {path, *earlier[: KEPT - 1]}:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(directory: Path, seal: Seal | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, with a warning for each newer one that is not; None if there is none at all.

    Raises:
        RunError: there are some, and every one is damaged, or sealed where no seal is given, or not where one is.
    """
    paths = _newest_first(directory)
    if any((path.suffix == ENDING) != (seal is not None) for path in paths):
        raise RunError(
            f"{directory} holds checkpoints that are not {'' if seal else 'un'}sealed, as this run's are; "
            "move them away, or restore the run's own"
        )
    for path in paths:
        found = _read(path) if seal is None else _unsealed(path, seal)
        if found is not None:
            return found
        log.warning("%s is damaged: it is left out, and an earlier checkpoint is looked for", path)
    if paths:
        raise RunError(f"every checkpoint in {directory} is damaged; restore one, or start a new run in another --out")
    return None


def _read(path: Path) -> Checkpoint | None:
    matched = _NAME.fullmatch(path.name)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        if matched is None or digest != matched[2]:
            return None
        with safe_open(path, framework="pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return _checked(facts, tensors)


def _unsealed(path: Path, seal: Seal) -> Checkpoint | None:
    try:
        tensors, about = read_tensors(seal.read(path, _purpose(path)), path)
        return _checked(json.loads(about["facts"]), tensors)
    except (OSError, BundleError, KeyError, ValueError):
        return None


def _checked(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint | None:
    return Checkpoint(facts["step"], tensors, facts) if facts.get("format") == FORMAT else None


def _digest(content: bytes, seal: Seal | None) -> str:
    """What a checkpoint's name carries; of a sealed one, nothing that could be compared with a guess."""
    return hashlib.sha256(content).hexdigest()[:16] if seal is None else secrets.token_hex(8)


def _purpose(path: Path) -> str:
    return f"checkpoints/{path.name.removesuffix(ENDING)}"


def _newest_first(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("step-*.safetensors*") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)
