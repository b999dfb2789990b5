"""What commands of offsite tuning say to their user: who vouches for what, what is kept, and what to give instead."""

import io
import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_client import server as asking
from edge_client.cli import app
from edge_client.finished import Using, evaluate
from edge_client.kill_revive import KillRevive, Plan, PortShape
from edge_client.server import fetch_emulator, list_emulators
from edge_client.submitting import pack, submit
from isthmus import bundle
from isthmus.errors import BundleError, DrainingError, InterruptedRunError, IsthmusError, UnreachableError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.report.evaluated import read
from isthmus.report.units import size
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.training import run_here, settings
from tests.offsite.by_hand import make_run
from tests.offsite.conftest import Node

QUIET = Console(file=io.StringIO())
NOBODY = "nobody vouches for this emulator: give --certs"


def offsite(folder: Path, data: Path, **changes: Any) -> Any:
    """Settings of a short run on an emulator that is here."""
    return settings(None, data, method="offsite", emulator=str(folder), cut=None, steps=1, **changes)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle cache with nothing in it."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_emulator_whose_signature_nobody_checked_is_loaded_with_a_word(
    node: Node, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "edge_client"):
        run_here(offsite(node.emulators / "half", rows, certs=node.owner / "alice"), tmp_path / "checked")
        assert NOBODY not in caplog.text
        run_here(offsite(node.emulators / "half", rows), tmp_path / "unchecked")
        assert caplog.text.count(NOBODY) == 1


def test_an_emulator_that_its_owner_did_not_sign_is_refused_by_name_where_there_is_a_key(
    node: Node, rows: Path, tmp_path: Path
) -> None:
    unsigned = tmp_path / "unsigned"
    shutil.copytree(node.emulators / "half", unsigned)
    (unsigned / "manifest.sig").write_bytes(bytes(64))
    with pytest.raises(BundleError, match=rf"{unsigned} is not signed by the model owner.* or leave out --certs"):
        run_here(offsite(unsigned, rows, certs=node.owner / "alice"), tmp_path / "run")
    run_here(offsite(unsigned, rows), tmp_path / "run")


# ---- a fetch that does not end


def fetching(node: Node, cache: Path, end: BaseException, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fetch, where the first try ends so in the middle, and all others at once."""
    real, tries = asking._frames, itertools.count()

    def ending(*given: Any) -> Iterator[pb.BundleFrame]:
        yield from itertools.islice(real(*given), 3 if next(tries) == 0 else 0)
        raise end

    monkeypatch.setattr(asking, "_frames", ending)
    monkeypatch.setattr(asking.time, "sleep", lambda _: None)
    address, alice = node.server.address, node.identity("alice")
    (offer,) = (one for one in list_emulators(address, alice, Ledger()) if one.name == "large")
    return fetch_emulator(address, alice, offer, None, cache, Ledger(), lambda *_: None)


def kept(cache: Path) -> int:
    """Bytes of the bundle's files that have arrived."""
    (part,) = cache.glob("*.part")
    return sum(path.stat().st_size for path in part.iterdir() if not path.name.startswith("manifest"))


def test_who_stops_a_fetch_is_told_how_much_is_kept_and_that_the_same_command_goes_on(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedRunError) as caught:
        fetching(node, tmp_path, KeyboardInterrupt(), monkeypatch)
    whole = bundle.verify(node.emulators / "large", None).total_bytes
    assert 0 < kept(tmp_path) < whole
    assert str(caught.value) == (
        f"the fetch was stopped: {size(kept(tmp_path))} of the {size(whole)} of the emulator are here; "
        "the same command goes on from there"
    )


@pytest.mark.parametrize("error", [UnreachableError, DrainingError])
def test_a_fetch_whose_server_dies_says_the_reason_and_how_much_is_kept(
    error: type[IsthmusError], node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=r"^it died; \d.* of the \d.* of the emulator are here; the same command goes on"):
        fetching(node, tmp_path, error("it died"), monkeypatch)
    assert kept(tmp_path)


def test_a_fetch_that_cannot_go_on_promises_nothing(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match=r"^damaged$"):
        fetching(node, tmp_path, BundleError("damaged"), monkeypatch)


# ---- a run whose emulator was a folder


@pytest.fixture
def from_a_folder(node: Node, rows: Path, tmp_path: Path) -> Path:
    """A run that knows no server."""
    run_here(offsite(node.emulators / "half", rows), tmp_path / "run")
    return tmp_path / "run"


def test_what_needs_a_server_says_why_the_run_knows_none(from_a_folder: Path, rows: Path) -> None:
    with pytest.raises(UsageError, match=r"^--span remote needs --server HOST:PORT: .* its emulator was a folder$"):
        evaluate(from_a_folder, rows, Using("remote"), QUIET)
    with pytest.raises(UsageError, match=r"^--server is needed: .* it had its emulator from a folder$"):
        submit(from_a_folder, None, None, False, QUIET)


def test_a_submission_names_the_emulator_that_it_was_tuned_on(from_a_folder: Path, node: Node, tmp_path: Path) -> None:
    for name in ("tuned", "untuned"):
        (tmp_path / name).mkdir()
    tuned = pack(from_a_folder, tmp_path / "tuned", node.publisher)
    assert tuned.about["emulator"] == bundle.verify(node.emulators / "half", None).id
    other = pack(make_run(tmp_path / "other", node.model), tmp_path / "untuned", node.publisher)
    assert "emulator" not in other.about


@pytest.mark.usefixtures("own_cache")
def test_an_evaluation_that_had_to_fetch_the_ends_says_how_much(from_a_folder: Path, node: Node, rows: Path) -> None:
    at = ["--server", f"localhost:{node.server.address.rpartition(':')[2]}", "--certs", str(node.owner / "alice")]
    command = ["evaluate", "--run", str(from_a_folder), "--data", str(rows), "--span", "remote", "--untouched", *at]
    first, second = (CliRunner().invoke(app, command).stdout for _ in range(2))
    lines = read(from_a_folder).evaluations
    assert lines[0].fetched_bytes
    crossed = f"{size(lines[0].up_bytes)} up, {size(lines[0].down_bytes)} down"
    assert first.endswith(f"{crossed}; before it {size(lines[0].fetched_bytes)} fetched\n")
    assert lines[1].fetched_bytes == 0
    assert second.endswith(f"{crossed}\n")


def test_scores_of_other_modules_are_refused_with_the_way_to_make_them() -> None:
    ports = {f"{block}.q_proj": PortShape(block, "q", own=1, shared=1) for block in (3, 4)}
    for scores in ({"3.q_proj": 1.0, "9.q_proj": 1.0}, {"3.q_proj": 1.0, "4.q_proj": float("nan")}):
        with pytest.raises(UsageError, match=r"1 of this run's 2 modules, and none for 4\.q_proj: .*importances`"):
            KillRevive(ports, Plan(0.5, 1, 0, "importance", 0, scores))
