"""The file of an audit log outlives kills, full disks and its own size, and says what it lost."""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloud_node import audit
from cloud_node.audit import AuditLog, pieces
from cloud_node.audit_reading import lines, usage, verify
from isthmus.errors import AuditError, UsageError

ALICE = "spiffe://isthmus/edge/alice"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@contextmanager
def kept(path: Path) -> Iterator[AuditLog]:
    log = AuditLog(path)
    try:
        yield log
    finally:
        log.close()


def actions(path: Path) -> list[str]:
    return [said["action"] for _, said, _ in lines(path)]


def test_the_chain_goes_on_where_it_stood(path: Path) -> None:
    with kept(path) as log:
        log.record("open", ALICE, thing="s1", tokens=3)
    with kept(path) as log:
        log.record("close", ALICE, thing="s1")
        end = log.end
    assert actions(path) == ["begin", "open", "close"]
    assert verify(path) == (3, end)
    assert path.stat().st_mode & 0o077 == 0


def test_a_hash_noted_elsewhere_finds_lines_taken_off_the_end(path: Path) -> None:
    with kept(path) as log:
        for number in range(5):
            log.record("open", ALICE, thing=f"s{number}")
        assert log.end is not None
        noted = log.end.hash
    content = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(content[:-2]))
    assert verify(path)[0] == 4
    with pytest.raises(AuditError, match="no line has the hash"):
        verify(path, noted)
    path.write_bytes(b"".join(content))
    assert verify(path, noted)[0] == 6


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_torn_line_is_set_aside_and_told_of(path: Path, left: int) -> None:
    with kept(path) as log:
        log.record("open", ALICE, thing="s1")
        log.record("close", ALICE, thing="s1")
    whole = path.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    path.write_bytes(whole[: len(whole) - len(last)] + last[:left])
    with kept(path) as log:
        log.record("open", ALICE, thing="s2")
    assert actions(path) == ["begin", "open", "torn", "open"]
    (aside,) = path.parent.glob("audit.jsonl.torn-*")
    assert aside.read_bytes() == last[:left]


def test_a_log_whose_last_line_was_changed_is_not_gone_on_with(path: Path) -> None:
    with kept(path) as log:
        log.record("open", ALICE, thing="s1", tokens=3)
    path.write_bytes(path.read_bytes().replace(b'"tokens":3', b'"tokens":4'))
    with pytest.raises(AuditError, match="was changed"):
        AuditLog(path)


def test_a_large_file_is_put_aside_and_the_chain_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PIECE_BYTES", 1500)
    for part in range(3):
        with kept(path) as log:
            for number in range(10):
                log.record("open", ALICE, thing=f"s{part}-{number}")
    assert len(pieces(path)) > 4
    assert verify(path)[0] == 31
    pieces(path)[1].unlink()
    with pytest.raises(AuditError, match=r"does not follow|should have n"):
        verify(path)


def test_pieces_that_were_taken_away_make_no_later_one_overwritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PIECE_BYTES", 1500)
    with kept(path) as log:
        for number in range(30):
            log.record("open", ALICE, thing=f"s{number}")
        first, *held = pieces(path)[:-1]
        first.unlink()
        before = {piece: piece.read_bytes() for piece in held}
        for number in range(30):
            log.record("open", ALICE, thing=f"t{number}")
    assert before
    assert {piece: piece.read_bytes() for piece in held} == before


def test_a_piece_that_cannot_be_begun_is_begun_later_and_no_line_is_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "PIECE_BYTES", 600)
    opened = audit._opened

    def none_left(_: Path) -> int:
        raise OSError(24, "Too many open files")

    with kept(path) as log:
        with monkeypatch.context() as patched:
            patched.setattr(audit, "_opened", none_left)
            for number in range(10):
                log.record("open", ALICE, thing=f"s{number}")
            with pytest.raises(AuditError, match="cannot write its audit log"):
                log.require()
        assert audit._opened is opened
        log.require()
    assert verify(path)[0] == 11
    assert len(pieces(path)) > 1


def test_a_second_node_does_not_write_the_same_file(path: Path) -> None:
    with kept(path), pytest.raises(AuditError, match="another node writes it"):
        AuditLog(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be written"):
        AuditLog(tmp_path)
    with pytest.raises(UsageError, match="there is no audit log"):
        verify(tmp_path / "none")


@contextmanager
def no_room(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_lets_nothing_new_begin_and_loses_no_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "WAITING", 3)
    with kept(path) as log:
        with no_room(path.stat().st_size + 100):
            for number in range(5):
                log.record("close", ALICE, thing=f"s{number}")
            with pytest.raises(AuditError, match="cannot write its audit log"):
                log.require()
        log.require()
        log.record("open", ALICE, thing="later")
    told = [(said["action"], said["object"] or said["lines"]) for _, said, _ in lines(path)][1:]
    assert told == [("close", "s0"), ("close", "s1"), ("close", "s2"), ("lost", 2), ("open", "later")]
    assert [each.tenant for each in usage(path)] == [ALICE]


def test_a_killed_process_loses_no_line_that_was_recorded(path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from cloud_node.audit import AuditLog; "
        "log = AuditLog(Path(sys.argv[1])); [log.record('open', 'x', thing=str(n)) for n in range(200)]; "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], timeout=60).returncode == -9
    assert verify(path)[0] == 201


def test_a_line_is_plain_json_with_who_what_and_how_it_ended(path: Path) -> None:
    with kept(path) as log:
        log.record("fetch-ends", ALICE, "bundle", thing="ab", sent_bytes=5)
    said = json.loads(path.read_text().splitlines()[1])
    assert {said[name] for name in ("action", "actor", "outcome", "object")} == {"fetch-ends", ALICE, "bundle", "ab"}
    assert said["time"].endswith("+00:00")
