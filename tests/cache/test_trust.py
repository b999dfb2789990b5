"""Nothing that is kept is used beyond what made it: runtimes of outputs, authorities of cards; nor counted if torn."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from edge_client import server
from edge_client.cached import Row
from edge_client.prefetch import Prefetched, prefetch
from edge_client.server import describe_or_recall
from isthmus import PROTOCOL
from isthmus.errors import UnreachableError
from isthmus.ledger.record import Ledger
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb
from tests.cache.training import entries, kept, run_kept
from tests.harness import Server
from tests.parity.reference import connected

# Outputs of another runtime


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fetched_rows(node: Server, where: Path, deterministic: bool) -> float:
    """Of two rows, those that an edge does not find in the cache."""
    ledger = Ledger()
    with connected(node, "1:1", ledger, train="top", cache=where, deterministic=deterministic) as edge:
        edge.cached_outputs().of([Row((3, 4, 5)), Row((6, 7))])
    return ledger.total("train", "fetched_rows")


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_deterministic_runs_fetch_again_what_an_edge_with_other_threads_kept(
    servers: dict[str, Server], tmp_path: Path, deterministic: bool
) -> None:
    assert fetched_rows(servers["llama"], tmp_path, deterministic) == 2
    with threads(torch.get_num_threads() + 1):
        assert fetched_rows(servers["llama"], tmp_path, deterministic) == (2 if deterministic else 0)
    assert fetched_rows(servers["llama"], tmp_path, deterministic) == 0


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_deterministic_runs_fetch_again_what_a_server_of_another_runtime_answered(
    servers: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    assert fetched_rows(servers["llama"], tmp_path, deterministic) == 2

    def elsewhere(*given: Any) -> tuple[pb.ModelCard, bool]:
        card, present = describe_or_recall(*given)
        assert card.runtime
        card.runtime = "isthmus 0, torch 0, cpu, 1 threads"
        return card, present

    monkeypatch.setattr("edge_client.assemble.describe_or_recall", elsewhere)
    assert fetched_rows(servers["llama"], tmp_path, deterministic) == (2 if deterministic else 0)


# Model cards

ADDRESS = "cloud.example:7070"
Line = Callable[[pb.ModelCard | None], None]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    """Say what the server at the address answers from now on; None: there is none."""

    def set_card(card: pb.ModelCard | None) -> None:
        def describe(*_: object) -> pb.ModelCard:
            if card is None:
                raise UnreachableError("nothing listens")
            return card

        monkeypatch.setattr(server, "describe", describe)

    return set_card


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Credentials | None]:
    """Without credentials, and with those of two authorities."""
    found: dict[str, Credentials | None] = {"plaintext": None}
    for authority in ("one", "other"):
        directory = tmp_path_factory.mktemp(authority)
        certificates.init_authority(directory)
        certificates.issue(directory, "edge")
        found[authority] = Credentials.load(directory / "edge")
    return found


@pytest.mark.parametrize("giver", ["plaintext", "one", "other"])
@pytest.mark.parametrize("asker", ["plaintext", "one", "other"])
def test_a_card_is_remembered_for_its_authority_alone(
    identities: dict[str, Credentials | None], line: Line, tmp_path: Path, giver: str, asker: str
) -> None:
    card = pb.ModelCard(protocol=PROTOCOL, model="m", model_digest="ab" * 32)
    line(card)
    assert describe_or_recall(ADDRESS, identities[giver], Ledger(), tmp_path) == (card, True)
    line(None)
    if giver == asker:
        assert describe_or_recall(ADDRESS, identities[asker], Ledger(), tmp_path) == (card, False)
    else:
        with pytest.raises(UnreachableError):
            describe_or_recall(ADDRESS, identities[asker], Ledger(), tmp_path)


def test_a_card_of_another_protocol_is_as_good_as_none(line: Line, tmp_path: Path) -> None:
    line(pb.ModelCard(protocol=PROTOCOL - 1, model="m"))
    describe_or_recall(ADDRESS, None, Ledger(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    line(None)
    with pytest.raises(UnreachableError):
        describe_or_recall(ADDRESS, None, Ledger(), tmp_path)


# Entries that a prefetch finds


def write_data(path: Path, words: str) -> Path:
    """A row for each letter, all of one length."""
    rows = ({"prompt": f"{word * 5}:", "choices": [" a", " b"], "answer": 0} for word in words)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prefetched(node: Server, data: Path, where: Path, **changes: Any) -> Prefetched:
    return prefetch(kept(node, data, where, eval_data=None, **changes), Console(quiet=True))


def test_a_torn_entry_counts_as_missing_and_is_fetched_by_a_prefetch(
    servers: dict[str, Server], tmp_path: Path, cache: Path
) -> None:
    data, where = write_data(tmp_path / "rows.jsonl", "abcdef"), tmp_path / "kept"
    assert prefetched(servers["llama"], data, where).fetched == 6
    torn = entries(where)[2]
    size = torn.stat().st_size
    os.truncate(torn, size // 2)
    again = prefetched(servers["llama"], data, where)
    assert (again.rows, again.present, again.fetched) == (6, 5, 1)
    assert torn.stat().st_size == size
    assert prefetched(servers["llama"], data, where).fetched == 0


def test_what_a_prefetch_finds_there_is_not_the_first_to_go(
    servers: dict[str, Server], tmp_path: Path, cache: Path
) -> None:
    where, node = tmp_path / "kept", servers["llama"]
    prefetched(node, write_data(tmp_path / "wanted.jsonl", "abcdef"), where)
    wanted = entries(where)
    prefetched(node, write_data(tmp_path / "other.jsonl", "ghijklmn"), where)
    for path in wanted:
        os.utime(path, (time.time() - 3600,) * 2)
    full = sum(path.stat().st_size for path in entries(where))
    more = write_data(tmp_path / "more.jsonl", "abcdefop")
    done = prefetched(node, more, where, cache_limit=full)
    assert (done.present, done.fetched) == (6, 2)
    assert all(path.exists() for path in wanted)
    assert len(entries(where)) < 16
    report = run_kept(node, more, where, tmp_path / "run", eval_data=None, steps=1, cache_limit=full)
    assert report.cost.wire.cache is not None
    assert report.cost.wire.cache.train.fetched_rows == 0
