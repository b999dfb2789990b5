"""An entry comes back exactly as it crossed the wire, and only for the same row from the same origin."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from edge_client.cache import Origin, OutputCache, row_key
from isthmus.wire.tensors import pack
from tests.cache.by_hand import KEY, ORIGIN, OTHER_KEY, OTHERS, PLENTY, encoded, equal, file_of, stands


@pytest.mark.parametrize("codec", ["none", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("shapes", [[(3, 50)], [(1, 5, 64), (5, 7), (), (0, 4)], []])
def test_an_entry_comes_back_bit_for_bit_as_it_crossed(
    tmp_path: Path, codec: str, shapes: list[tuple[int, ...]]
) -> None:
    sent = [encoded(number, codec, shape) for number, shape in enumerate(shapes)]
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, sent)
    opened_later = OutputCache(tmp_path, PLENTY, ORIGIN)
    assert stands(opened_later, KEY)
    assert equal(opened_later.get(KEY), sent)


def test_types_that_only_cross_as_they_are_come_back_too(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    sent = [pack(torch.arange(9), "none"), pack(torch.randn(9).bfloat16(), "none"), pack(torch.ones(3).bool(), "none")]
    cache.put(KEY, sent)
    assert equal(cache.get(KEY), sent)


def test_a_received_buffer_can_be_kept_and_what_comes_back_is_its_readers_own(tmp_path: Path) -> None:
    cache, (header, payload) = OutputCache(tmp_path, PLENTY, ORIGIN), encoded()
    cache.put(KEY, [(header, memoryview(bytearray(b"before" + bytes(payload)))[6:])])
    first = cache.get(KEY)
    assert first is not None
    first[0].zero_()
    assert equal(cache.get(KEY), [(header, payload)])


def test_an_entry_holds_the_payload_as_it_crossed_in_a_file_that_any_safetensors_reader_opens(tmp_path: Path) -> None:
    header, payload = encoded(codec="int8")
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [(header, payload)])
    with safe_open(file_of(tmp_path), framework="np") as stored:
        assert stored.get_tensor("0").tobytes() == bytes(payload)
        assert stored.metadata()["format"] == "isthmus-outputs/1"
        assert stored.metadata()["key"] == KEY
        assert json.loads(stored.metadata()["origin"])["model_digest"] == ORIGIN.model_digest


def test_what_was_never_put_is_not_there(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    cache.put(OTHER_KEY, [encoded()])
    assert not stands(cache, KEY)
    assert cache.get(KEY) is None


def test_an_entry_put_again_is_the_last_one_put(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path, PLENTY, ORIGIN)
    for number in (1, 2):
        cache.put(KEY, [encoded(number)])
    assert equal(cache.get(KEY), [encoded(2)])


# Keys


ROWS = st.tuples(
    st.lists(st.integers(0, 12), max_size=3),
    st.integers(0, 3),
    st.none() | st.lists(st.booleans(), max_size=3),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(ROWS, ROWS)
def test_keys_are_the_same_exactly_for_the_same_row(
    one: tuple[list[int], int, list[bool] | None, bool], other: tuple[list[int], int, list[bool] | None, bool]
) -> None:
    assert (row_key(*one) == row_key(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (([1, 23], 0, None, False), ([12, 3], 0, None, False)),
        (([1], 2, None, False), ([1, 2], 0, None, False)),
        (([], 1, None, False), ([1], 0, None, False)),
        (([1], 0, None, False), ([1], 0, [], False)),
        (([1], 0, None, False), ([1], 0, [True], False)),
        (([1, 2], 0, [True, False], False), ([1, 2], 0, [False, True], False)),
    ],
)
def test_rows_that_look_alike_have_different_keys(one: Any, other: Any) -> None:
    assert row_key(*one) != row_key(*other)


def test_a_row_has_one_key_whatever_holds_it() -> None:
    ids, wanted = torch.tensor([5, 6]), torch.tensor([True, False])
    assert row_key(tuple(ids), 3, tuple(wanted), False) == row_key([5, 6], 3, [True, False], False)


@pytest.mark.parametrize("other", OTHERS)
def test_an_entry_of_any_other_origin_is_not_there(tmp_path: Path, other: Origin) -> None:
    OutputCache(tmp_path, PLENTY, ORIGIN).put(KEY, [encoded()])
    assert not stands(OutputCache(tmp_path, PLENTY, other), KEY)
    assert OutputCache(tmp_path, PLENTY, other).get(KEY) is None
    assert stands(OutputCache(tmp_path, PLENTY, ORIGIN), KEY)
