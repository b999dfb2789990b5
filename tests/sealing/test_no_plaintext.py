"""Nothing that a sealed run has learnt or kept stands on a disk as it is: not in its folder, its cache or a temporary
file, neither afterwards nor at any moment on the way.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.cache import OutputCache
from edge_client.runs import RunDirectory
from edge_client.submitting import packed_from
from edge_client.train import _Trainer
from isthmus.training import checkpoints
from tests.cache.training import kept
from tests.faults.training import as_flags, run_here, settings
from tests.harness import Server
from tests.sealing.conftest import Edge
from tests.sealing.watched import Seen, watched

WINDOW = 16


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> tuple[Path, ...]:
    """Where anything might be left: the run's folder, temporary files, the caches."""
    places = (tmp_path / "runs", tmp_path / "tmp")
    for place in places:
        place.mkdir()
    monkeypatch.setenv("TMPDIR", str(places[1]))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return (*places, cache)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tiny_models: dict[str, Path]) -> dict[str, bytes]:
    """Bytes of each tensor that is saved or kept, by what it is: some that are not like others.

    A row of the embedding that no text used is still the model's own, which lies in the caches for all to read.
    """
    found: dict[str, bytes] = {}
    public = (tiny_models["llama"] / "model.safetensors").read_bytes()

    def note(name: str, value: torch.Tensor) -> None:
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        middle = len(content) // 2 // WINDOW * WINDOW
        for part in (content[:WINDOW], content[middle : middle + WINDOW]):
            if len(set(part)) > WINDOW // 2 and part not in public:
                found[f"{name} {len(found)}"] = part

    save, save_adapter, put = checkpoints.save, _Trainer._save_adapter, OutputCache.put

    def saved(tensors: dict[str, torch.Tensor], **given: object) -> bytes:
        for name, value in tensors.items():
            note(f"checkpoint {name}", value)
        content: bytes = save(tensors, **given)
        return content

    def adapter(trainer: _Trainer) -> None:
        for name, value in trainer._tuning.saved().items():
            note(f"adapter {name}", value)
        save_adapter(trainer)

    def putting(cache: OutputCache, key: str, tensors: list[tuple[object, bytes]]) -> None:
        for _, payload in tensors:
            note("output", torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        put(cache, key, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save", saved)
    monkeypatch.setattr(_Trainer, "_save_adapter", adapter)
    monkeypatch.setattr(OutputCache, "put", putting)
    return found


def found_in(seen: Seen, secrets: dict[str, bytes], kind: str) -> list[str]:
    """Files that held, at some moment, what is of this kind."""
    needles = [part for name, part in secrets.items() if name.startswith(kind)]
    assert needles
    return sorted({place for needle in needles for place in seen.where(needle)})


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_of_a_local_run_and_of_all_that_is_done_with_it(
    edge: Edge,
    tiny_models: dict[str, Path],
    rows: Path,
    folders: tuple[Path, ...],
    secrets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    peft: str,
) -> None:
    config = settings(
        None, rows, method="local", model=str(tiny_models["llama"]), steps=3, checkpoint_every=1, peft=peft
    )
    with watched(monkeypatch, *folders) as control:
        run_here(config, folders[0] / "plain")
    for kind in ("checkpoint master", "adapter"):
        assert found_in(control, secrets, kind), f"{kind}: the search finds nothing where there is something"
    secrets.clear()
    run = folders[0] / "sealed"
    with watched(monkeypatch, run, *folders[1:]) as seen:
        assert edge("train", *as_flags(config), "--seal", "--out", run)[0] == 0
        assert edge("train", "--resume", "--out", run)[0] == 0
        assert edge("evaluate", "--run", run, "--data", rows)[0] == 0
        assert edge("generate", "--run", run, "--prompt", "good", "--max-new-tokens", "2")[0] == 0
        directory = RunDirectory(run)
        directory.unlock(None)
        monkeypatch.setenv("ISTHMUS_NEW_PASSPHRASE", "another")
        assert edge("reseal", "--run", run)[0] == 0
    assert any(name.endswith(".tmp") for name in seen.files)  # it did look while files were being written
    assert any(name.endswith(".sealed") for name in seen.files)
    for kind in ("checkpoint", "adapter"):
        assert found_in(seen, secrets, kind) == []
    assert directory.seal is not None
    assert seen.where(directory.seal.key) == seen.where(directory.seal.key.hex().encode()) == []


def test_of_a_run_whose_outputs_are_kept(
    edge: Edge,
    servers: dict[str, Server],
    rows: Path,
    folders: tuple[Path, ...],
    secrets: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = kept(servers["llama"], rows, folders[0] / "outputs", steps=2)
    with watched(monkeypatch, *folders) as control:
        run_here(config, folders[0] / "plain")
    assert found_in(control, secrets, "output")
    secrets.clear()
    places = (folders[0] / "sealed", folders[0] / "sealed-outputs")
    config = kept(servers["llama"], rows, places[1], steps=2)
    with watched(monkeypatch, *places, *folders[1:]) as seen:
        assert edge("train", *as_flags(config), "--seal", "--out", places[0])[0] == 0
    for kind in ("output", "checkpoint", "adapter"):
        assert found_in(seen, secrets, kind) == []


def test_of_an_adapter_on_its_way_to_the_owner(
    sealed: Path, plain: Path, folders: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(sealed)
    directory.unlock(None)
    weights = (plain / "adapter" / "adapter_model.safetensors").read_bytes()
    with watched(monkeypatch, sealed, folders[1]) as seen:
        packed = packed_from(directory, folders[1], Ed25519PrivateKey.generate())
        assert weights in b"".join(data for _, data in packed.read())
    assert seen.where(weights[-WINDOW:]) == []
