"""A disk that is full, refuses or may only be read costs no entry that need not go, and is told of in one line."""

import errno
import os
import stat
from pathlib import Path

import pytest

from edge_client.cache import OutputCache
from isthmus.errors import RunError
from tests.cache.by_hand import KEY, KEYS, ORIGIN, OTHER_KEY, PLENTY, encoded, equal, file_of, stands, used


def test_only_the_owner_can_read_the_cache(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    umask = os.umask(0)
    try:
        OutputCache(place, PLENTY, ORIGIN).put(KEY, [encoded()])
    finally:
        os.umask(umask)
    folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    assert len(folders) == 3
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert stat.S_IMODE(file_of(place).stat().st_mode) == 0o600


def full_until(directory: Path, remaining: int, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    """A disk that takes no further entry while `directory` holds more than `remaining`."""
    replaced = Path.replace

    def refuse(draft: Path, target: Path) -> Path:
        if len(list(directory.rglob("*.safetensors"))) > remaining:
            raise OSError(code, os.strerror(code))
        return replaced(draft, target)

    monkeypatch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_the_older_half_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    for age, key in enumerate(KEYS[:10]):
        cache.put(key, [encoded()])
        used(file_of(tmp_path, key), age)
    full_until(tmp_path, 5, monkeypatch, code)
    cache.put(KEY, [encoded(1)])
    assert equal(cache.get(KEY), [encoded(1)])
    assert [stands(cache, key) for key in KEYS[:10]] == [True] * 5 + [False] * 5


def test_a_disk_that_stays_full_gives_one_line_that_says_what_to_do_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    for key in KEYS[:4]:
        cache.put(key, [encoded()])
    full_until(tmp_path, -1, monkeypatch)
    with pytest.raises(RunError, match=r"(?i)no space left.*free some space, or give another --cache") as error:
        cache.put(KEY, [encoded()])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))
    assert sum(stands(cache, key) for key in KEYS[:4]) == 2


def test_a_disk_that_refuses_for_another_reason_costs_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(OTHER_KEY, [encoded()])
    full_until(tmp_path, -1, monkeypatch, errno.EROFS)
    with pytest.raises(RunError, match="another --cache"):
        cache.put(KEY, [encoded()])
    assert equal(cache.get(OTHER_KEY), [encoded()])


def test_a_directory_that_cannot_be_made_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(RunError, match=r"cannot be written .* another --cache"):
        OutputCache(tmp_path / "a file" / "cache", PLENTY, ORIGIN)
    with pytest.raises(RunError, match=r"cannot be written .* another --cache"):
        OutputCache(tmp_path / "a file", PLENTY, ORIGIN)


def test_a_cache_that_may_only_be_read_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(KEY, [encoded()])

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refuse)
    assert equal(cache.get(KEY), [encoded()])
