"""What a server says is checked before it is used, and printed so that a terminal obeys none of it."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_client import offsite as loading
from edge_client import submitting
from edge_client.submitting import submit
from isthmus import bundle
from isthmus.errors import UsageError, WireError
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.training import run_here, settings
from tests.offsite.by_hand import make_run
from tests.offsite.conftest import Node

OTHER = "0e" * 32


def served(node: Node, data: Path, **changes: Any) -> Any:
    """Settings of a short run on an emulator that a node offers."""
    at = {"server": f"localhost:{node.server.address.rpartition(':')[2]}", "certs": node.owner / "alice"}
    usual = {"method": "offsite", "cut": None, "emulator": "half", "steps": 1, **at}
    return settings(None, data, **{**usual, **changes})


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle cache with nothing in it."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("fetched_before", [False, True])
@pytest.mark.usefixtures("own_cache")
def test_an_emulator_of_another_model_than_the_one_served_is_refused(
    fetched_before: bool, node: Node, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fetched_before:
        run_here(served(node, rows), tmp_path / "before")
    describe = loading.describe

    def other(*given: Any) -> pb.ModelCard:
        card = describe(*given)
        card.model_digest = OTHER
        return card

    monkeypatch.setattr(loading, "describe", other)
    with pytest.raises(WireError, match="of another model than the one"):
        run_here(served(node, rows), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.usefixtures("own_cache")
def test_an_emulator_that_is_in_the_cache_is_hashed_once(
    node: Node, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(served(node, rows), tmp_path / "first")
    check, hashed = bundle._check_file, []

    def noted(directory: Path, entry: bundle.Entry) -> None:
        hashed.append(entry.name)
        check(directory, entry)

    monkeypatch.setattr(bundle, "_check_file", noted)
    run_here(served(node, rows), tmp_path / "by name")
    assert hashed.count("model.safetensors") == 1
    offer = bundle.verify(node.emulators / "half", None).id
    hashed.clear()
    run_here(served(node, rows, emulator=offer), tmp_path / "by id")
    assert hashed.count("model.safetensors") == 1


def test_a_receipt_for_something_else_is_no_receipt(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "_send", lambda *_: pb.SubmitReceipt(bundle="\x1b[31m" + OTHER))
    with pytest.raises(WireError, match=r"took another adapter than [0-9a-f]{64}, which was sent") as caught:
        submit(make_run(tmp_path, node.model), node.server.address, node.owner / "alice", False, quiet())
    assert str(caught.value).isprintable()


def test_names_of_emulators_cannot_move_the_cursor(
    node: Node, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = [pb.EmulatorOffer(name="\x1b[2Jwiped\r", bottom=1, top=1), pb.EmulatorOffer(name="half", bottom=1, top=1)]
    monkeypatch.setattr(loading, "list_emulators", lambda *_: offers)
    for asked in (None, "none"):
        with pytest.raises(UsageError, match=r"\\x1b\[2Jwiped\\r \(cut 1:1\)") as caught:
            run_here(served(node, rows, emulator=asked), tmp_path / "run")
        assert str(caught.value).isprintable()


def quiet() -> Console:
    return Console(file=io.StringIO())
