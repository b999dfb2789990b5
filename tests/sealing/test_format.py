"""A sealed file gives back exactly what was sealed, or says that it does not; there is nothing between."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import BundleError
from isthmus.trust.sealing import HEADER_BYTES, MAGIC, TAG_BYTES, Seal, SealedFile, sha256

LOG2 = 12
CHUNK = 1 << LOG2
STORED = CHUNK + TAG_BYTES
SEAL = Seal(bytes(range(16)), bytes(range(32)))
LENGTHS = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5)
PURPOSE = "checkpoints/one"


def content_of(length: int, seed: int = 0) -> bytes:
    """No two chunks of it are alike."""
    return b"".join((seed * 1_000_003 + at).to_bytes(8, "big") for at in range(length // 8 + 1))[:length]


def sealed(content: bytes, purpose: str = PURPOSE) -> bytes:
    return b"".join(SEAL.sealed(purpose, [content], LOG2))


def opened(stored: bytes, purpose: str = PURPOSE, seal: Seal = SEAL) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(stored)
        return seal.read(path, purpose)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_sealed_comes_back_and_nothing_of_it_can_be_seen(length: int) -> None:
    content = content_of(length)
    stored = sealed(content)
    assert opened(stored) == content
    assert len(stored) == HEADER_BYTES + length + TAG_BYTES * max(1, -(-length // CHUNK))
    assert not any(content[at : at + 16] in stored for at in range(0, length - 16, 16))
    assert sealed(content)[len(MAGIC) + 2 :] != stored[len(MAGIC) + 2 :]  # never twice the same


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2 * CHUNK + 3), max_size=8))
def test_in_whatever_pieces_it_comes(sizes: list[int]) -> None:
    content, start, pieces = content_of(sum(sizes)), 0, []
    for size in sizes:
        pieces.append(memoryview(content)[start : start + size])
        start += size
    assert opened(b"".join(SEAL.sealed(PURPOSE, pieces, LOG2))) == content


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LENGTHS), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_any_byte_that_is_changed_is_found_out(length: int, place: float, change: int, in_header: bool) -> None:
    stored = bytearray(sealed(content_of(length)))
    stored[int(place * (HEADER_BYTES if in_header else len(stored)))] ^= change
    with pytest.raises(BundleError):
        opened(bytes(stored))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(LENGTHS), st.data())
def test_a_file_that_is_cut_off_anywhere_or_goes_on_is_found_out(length: int, data: st.DataObject) -> None:
    stored = sealed(content_of(length))
    for kept in (data.draw(st.integers(0, len(stored) - 1)), *range(HEADER_BYTES, len(stored), STORED)):
        with pytest.raises(BundleError):
            opened(stored[:kept])
    for more in (data.draw(st.binary(min_size=1, max_size=40)), stored[-STORED:], stored[HEADER_BYTES:]):
        with pytest.raises(BundleError):
            opened(stored + more)


@pytest.mark.parametrize("length", [3 * CHUNK, 3 * CHUNK + 5])
def test_chunks_in_another_order_or_left_out_are_found_out(length: int) -> None:
    stored = sealed(content_of(length))
    header, body = stored[:HEADER_BYTES], stored[HEADER_BYTES:]
    chunks = [body[at : at + STORED] for at in range(0, len(body), STORED)]
    orders = [[1, 0, 2], [0, 2, 1], [0, 0, 2], [0, 2], [1, 2], [0, 1], [0, 1, 2, 2]]
    for order in orders:
        mixed = header + b"".join(chunks[at] for at in order) + b"".join(chunks[3:])
        with pytest.raises(BundleError):
            opened(mixed)
    assert opened(header + b"".join(chunks)) == content_of(length)


@pytest.mark.parametrize("header_too", [False, True])
def test_chunks_of_another_file_of_the_same_purpose_are_found_out(header_too: bool) -> None:
    one, other = sealed(content_of(3 * CHUNK)), sealed(content_of(3 * CHUNK, seed=1))
    first = HEADER_BYTES + STORED
    mixed = (other[:HEADER_BYTES] if header_too else one[:HEADER_BYTES]) + one[HEADER_BYTES:first] + other[first:]
    with pytest.raises(BundleError):
        opened(mixed)


def test_a_file_in_anothers_place_or_of_another_seal_is_refused() -> None:
    stored = sealed(b"weights")
    for purpose in ("checkpoints/two", "", PURPOSE + " "):
        with pytest.raises(BundleError, match="another file under this name"):
            opened(stored, purpose)
    with pytest.raises(BundleError, match="another run or cache"):
        opened(stored, seal=Seal.new())
    with pytest.raises(BundleError, match="another file under this name"):
        opened(stored, seal=Seal(SEAL.id, bytes(32)))


def test_what_is_no_sealed_file_is_said_to_be_none(tmp_path: Path) -> None:
    for stored in (b"", b"text", MAGIC, MAGIC + b"\x02" + bytes(200)):
        with pytest.raises(BundleError):
            opened(stored)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OSError, match="symbolic"):
        SEAL.read(tmp_path / "link", PURPOSE)
    with pytest.raises(BundleError, match="regular"):
        SEAL.read(tmp_path, PURPOSE)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(LENGTHS), st.integers(0, 4 * CHUNK), st.integers(0, 4 * CHUNK))
def test_any_part_can_be_read_alone(length: int, start: int, count: int) -> None:
    content = content_of(length)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(sealed(content))
        with SealedFile(path, PURPOSE, SEAL) as file:
            assert file.size == length
            assert file.read(start, count) == content[start : start + count]


def test_a_part_before_the_damage_is_not_read_from_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(sealed(content_of(3 * CHUNK))[: HEADER_BYTES + 2 * STORED])
    with pytest.raises(BundleError, match="cut off"):
        SealedFile(path, PURPOSE, SEAL)


def test_writing_and_reading_hold_a_chunk_or_two_at_a_time(tmp_path: Path) -> None:
    size, piece = 48 << 20, bytes(64 << 10)

    def pieces() -> Iterator[bytes]:
        for _ in range(size // len(piece)):
            yield piece

    path = tmp_path / "large"
    tracemalloc.start()
    SEAL.write(path, PURPOSE, pieces())
    digest = sha256(path, PURPOSE, SEAL)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(digest) == 64
    assert path.stat().st_size > size
    assert peak < 12 << 20


def test_names_say_nothing_and_differ_between_seals() -> None:
    other = Seal.new()
    assert SEAL.name("row") == SEAL.name("row") != SEAL.name("row 2")
    assert SEAL.name("row") != other.name("row")
    assert len(SEAL.name("row")) == 64
