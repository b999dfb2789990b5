"""A cache stays under its limit whoever else writes to its directory, and what goes is what was used longest ago."""

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from edge_client.cache import OutputCache
from tests.cache.by_hand import (
    KEY,
    KEYS,
    ORIGIN,
    OTHER_KEY,
    OTHERS,
    PLENTY,
    encoded,
    equal,
    file_of,
    size_of,
    stands,
    used,
)


def entry_size(directory: Path) -> int:
    """What each entry of `encoded()`'s shape takes on disk."""
    OutputCache(directory, PLENTY, ORIGIN).put(KEY, [encoded()])
    return file_of(directory).stat().st_size


def test_the_least_recently_used_go_first_whatever_their_origin(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    one, two = (OutputCache(tmp_path / "cache", 10 * size, origin) for origin in (ORIGIN, OTHERS[0]))
    for number in range(10):
        cache = one if number % 2 else two
        cache.put(KEYS[number], [encoded(number)])
        used(file_of(tmp_path / "cache", KEYS[number]), 100 - number)
    assert equal(two.get(KEYS[0]), [encoded(0)])
    one.put(KEYS[10], [encoded(10)])
    there = [number for number in range(11) if stands(one, KEYS[number]) or stands(two, KEYS[number])]
    assert there == [0, 3, 4, 5, 6, 7, 8, 9, 10]


def test_the_directory_never_exceeds_the_limit_and_an_eviction_leaves_nine_tenths(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    place, limit = tmp_path / "cache", 40 * size + size // 2
    cache, sizes = OutputCache(place, limit, ORIGIN), []
    for key in KEYS:
        cache.put(key, [encoded()])
        assert cache.get(key) is not None
        sizes.append(size_of(place))
    assert max(sizes) <= limit
    after_evictions = [now for before, now in pairwise(sizes) if now < before]
    assert after_evictions
    assert set(after_evictions) == {36 * size}


def test_a_cache_that_is_full_of_what_others_put_counts_it(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    place = tmp_path / "cache"
    one, two = (OutputCache(place, 20 * size, ORIGIN) for _ in range(2))
    for number in range(0, 80, 2):
        one.put(KEYS[number], [encoded()])
        two.put(KEYS[number + 1], [encoded()])
        assert size_of(place) <= 22 * size


def test_an_entry_larger_than_the_limit_is_not_kept_and_pushes_nothing_out(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, 10_000, ORIGIN)
    cache.put(KEY, [encoded()])
    cache.put(OTHER_KEY, [encoded(shape=(100, 100))])
    assert not stands(cache, OTHER_KEY)
    assert stands(cache, KEY)


def test_an_entry_between_nine_tenths_and_the_limit_is_kept_alone(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    cache = OutputCache(tmp_path / "cache", size, ORIGIN)
    for key in KEYS[:3]:
        cache.put(key, [encoded()])
        assert cache.get(key) is not None
        assert size_of(tmp_path / "cache") == size


def test_nothing_that_is_not_the_caches_own_is_counted_or_removed(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    place = tmp_path / "cache"
    foreign = [place / "model.safetensors", place / "0123456789abcdef" / "ab" / "notes.txt"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10 * size))
        used(path, 1e6)
    cache = OutputCache(place, 3 * size, ORIGIN)
    for key in KEYS[:3]:
        cache.put(key, [encoded()])
    assert all(path.exists() for path in foreign)
    assert all(stands(cache, key) for key in KEYS[:3])


def test_drafts_of_a_crash_go_after_an_hour_and_younger_ones_stay(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(KEY, [encoded()])
    old, young = (file_of(tmp_path).with_name(f"{KEY}.safetensors.{number * 8}.tmp") for number in "01")
    for draft, age in ((old, 3700), (young, 3500)):
        draft.touch()
        used(draft, age)
    OutputCache(tmp_path, PLENTY, ORIGIN).put(OTHER_KEY, [encoded()])
    assert not old.exists()
    assert young.exists()
    assert stands(cache, KEY)


def test_an_eviction_leaves_what_another_process_is_writing(tmp_path: Path) -> None:
    size = entry_size(tmp_path / "other")
    cache = OutputCache(tmp_path / "cache", 4 * size, ORIGIN)
    cache.put(KEY, [encoded()])
    draft = file_of(tmp_path / "cache").with_name(f"{KEY}.safetensors.00000000.tmp")
    draft.write_bytes(bytes(size))
    used(draft, 3500)
    for key in KEYS[:6]:
        cache.put(key, [encoded()])
        assert size_of(tmp_path / "cache") <= 4 * size
    assert draft.exists()


def test_making_a_cache_reads_none_of_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [encoded()])

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "scandir", refuse)
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    assert stands(cache, KEY)
    assert cache.get(KEY) is not None


def hammer(directory: Path, limit: int, seed: int) -> tuple[int, int]:
    """Put and get keys that another process puts and gets; the gets that found their entry, and those that did not."""
    torch.set_num_threads(1)
    draws = random.Random(seed)
    entries = [[encoded(number), encoded(number, "int8", (number, 40))] for number in range(12)]
    cache, hits, misses = OutputCache(directory, limit, ORIGIN), 0, 0
    for _ in range(800):
        number = draws.randrange(12)
        if draws.random() < 0.5:
            cache.put(KEYS[number], entries[number])
            continue
        got = cache.get(KEYS[number])
        if got is not None and not equal(got, entries[number]):
            raise AssertionError(f"a wrong tensor for {number}")
        hits, misses = hits + (got is not None), misses + (got is None)
    return hits, misses


def test_two_processes_share_a_directory_under_a_tight_limit(tmp_path: Path) -> None:
    limit = 12_000
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        for hits, misses in processes.map(hammer, [tmp_path] * 2, [limit] * 2, [1, 2]):
            assert hits > 100
            assert misses > 100
    assert size_of(tmp_path) <= 1.3 * limit
    assert not list(tmp_path.rglob("*.tmp"))
