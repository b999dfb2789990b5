"""What opens a seal, what does not, and what a hostile file may ask for."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import BundleError, RunError
from isthmus.trust import cache_seals, seal_keys
from isthmus.trust.seal_keys import FILE_NAME, KeyFile, Passphrase, keep, make_key_file, open_seal
from isthmus.trust.sealing import Seal


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    make_key_file(tmp_path / "seal.key")
    return KeyFile.load(tmp_path / "seal.key")


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_passphrase_opens_it_however_its_accents_are_written_and_no_other_does(tmp_path: Path) -> None:
    seal, path = Seal.new(), tmp_path / FILE_NAME
    keep(seal, path, Passphrase("caf\u00e9"))
    assert open_seal(path, Passphrase("cafe\u0301")) == seal
    for wrong in ("cafe", "caf\u00e9 ", ""):
        with pytest.raises(RunError, match="this passphrase does not open"):
            open_seal(path, Passphrase(wrong))
    assert seal.key.hex() not in path.read_text()
    assert seal.key.hex() not in repr(seal)
    assert "caf" not in repr(Passphrase("caf\u00e9"))


def test_a_key_file_opens_it_and_needs_no_scrypt(
    tmp_path: Path, key_file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal_keys, "Scrypt", None)
    seal, path = Seal.new(), tmp_path / FILE_NAME
    keep(seal, path, key_file)
    assert open_seal(path, key_file) == seal
    with pytest.raises(RunError, match="does not open"):
        open_seal(path, KeyFile(key_file.path, bytes(32)))
    with pytest.raises(RunError, match="is opened by a key file"):
        open_seal(path, Passphrase("x"))


def test_any_digit_that_is_changed_is_found_out(tmp_path: Path, key_file: KeyFile) -> None:
    path = tmp_path / FILE_NAME
    keep(Seal.new(), path, key_file)
    whole = path.read_text()
    for name in ("id", "nonce", "wrapped"):
        value = json.loads(whole)[name]
        for at in range(len(value)):
            path.write_text(whole.replace(value, f"{value[:at]}{'0' if value[at] != '0' else '1'}{value[at + 1 :]}"))
            with pytest.raises(RunError, match="does not open"):
                open_seal(path, key_file)


HOSTILE = [
    {"n": 1 << 21},
    {"n": 1 << 20, "r": 8},
    {"r": 1 << 20},
    {"p": 1 << 20},
    {"n": 3},
    {"n": 1 << 19, "r": 32},
    {"n": "131072"},
    {"n": 1 << 17, "r": 1},
]


@pytest.mark.parametrize("asked", HOSTILE, ids=str)
def test_a_file_that_asks_scrypt_for_too_much_is_refused_before_it_runs(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / FILE_NAME
    keep(Seal.new(), path, Passphrase("x"))
    changed(path, scrypt={**json.loads(path.read_text())["scrypt"], **asked})
    tracemalloc.start()
    with pytest.raises(BundleError, match="damaged"):
        open_seal(path, Passphrase("x"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_what_is_no_seal_is_refused_in_words(tmp_path: Path, key_file: KeyFile) -> None:
    path = tmp_path / FILE_NAME
    with pytest.raises(RunError, match="is gone, and with it the key"):
        open_seal(path, key_file)
    for content in (b"", b"{}", b"[" * 5000, b"\xff\x00"):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="damaged"):
            open_seal(path, key_file)
    keep(Seal.new(), path, key_file)
    changed(path, opened_by="passphrase")
    with pytest.raises(BundleError, match="damaged"):
        open_seal(path, Passphrase("x"))


def test_a_key_file_is_its_owners_alone_and_is_never_overwritten(tmp_path: Path, key_file: KeyFile) -> None:
    assert key_file.path.stat().st_mode & 0o777 == 0o600
    assert len(key_file.path.read_bytes()) == 32
    with pytest.raises(RunError, match="there already"):
        make_key_file(key_file.path)
    key_file.path.chmod(0o640)
    with pytest.raises(RunError, match="chmod 600"):
        KeyFile.load(key_file.path)
    key_file.path.chmod(0o600)
    key_file.path.write_bytes(bytes(33))
    with pytest.raises(RunError, match="32 bytes"):
        KeyFile.load(key_file.path)
    with pytest.raises(RunError, match="seal-key"):
        KeyFile.load(tmp_path / "none")


def test_another_secret_replaces_the_old_one_whole_or_not_at_all(
    tmp_path: Path, key_file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal, path = Seal.new(), tmp_path / FILE_NAME
    new = KeyFile(tmp_path / "new", bytes(range(32)))
    keep(seal, path, key_file)
    for called in ("fsync", "replace"):
        with monkeypatch.context() as dying:

            def die(*_: object) -> None:
                raise KeyboardInterrupt

            dying.setattr(os, called, die)
            with pytest.raises(KeyboardInterrupt):
                keep(seal, path, new)
        assert open_seal(path, key_file) == seal
    keep(seal, path, new)
    assert open_seal(path, new) == seal
    with pytest.raises(RunError):
        open_seal(path, key_file)


def test_a_shared_folder_has_a_seal_for_each_secret(tmp_path: Path, key_file: KeyFile) -> None:
    place = tmp_path / "cache"
    one = cache_seals.seal_of(place, key_file)
    two = cache_seals.seal_of(place, KeyFile(tmp_path / "two", bytes(32)))
    three = cache_seals.seal_of(place, Passphrase("three"))
    assert len({one.id, two.id, three.id}) == 3
    (cache_seals.files_of(place)[0].with_name("a.json")).write_text("{")  # another's damage
    assert cache_seals.seal_of(place, key_file) == one
    assert cache_seals.seal_of(place, Passphrase("three")) == three
    salts = {
        json.loads(path.read_text())["scrypt"]["salt"]
        for path in cache_seals.files_of(place)
        if "salt" in path.read_text()
    }
    cache_seals.seal_of(place, Passphrase("four"))
    again = {
        json.loads(path.read_text())["scrypt"]["salt"]
        for path in cache_seals.files_of(place)
        if "salt" in path.read_text()
    }
    assert salts == again  # so that one scrypt tries a passphrase on all of them
