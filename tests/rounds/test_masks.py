"""What a round's server sees of one edge says nothing, and what it sees of all is their sum."""

import hashlib
import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import RunError, UsageError, WireError
from isthmus.rounds.limits import MOST_EDGES
from isthmus.rounds.masks import Attempt, masked
from isthmus.rounds.quantised import HALF, Vector, average, grid, quantise

ATTEMPT = Attempt("0123456789abcdef", 3, 7)


def key_of(name: str, seed: int = 0) -> X25519PrivateKey:
    """A key that is the same in each run of a test."""
    return X25519PrivateKey.from_private_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest())


def views(vectors: dict[str, Vector], attempt: Attempt = ATTEMPT) -> dict[str, Vector]:
    """What the server sees of each edge."""
    keys = {name: key_of(name) for name in vectors}
    public = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    return {
        name: masked(vector, name, keys[name], {k: v for k, v in public.items() if k != name}, attempt, b"r" * 32)
        for name, vector in vectors.items()
    }


def uniform(seen: Vector) -> float:
    """Chi-square of the bytes against 256 equally likely values, in standard deviations from its mean."""
    counts = np.bincount(np.frombuffer(seen.tobytes(), np.uint8), minlength=256)
    expected = counts.sum() / 256
    return (float(((counts - expected) ** 2).sum() / expected) - 255) / math.sqrt(2 * 255)


@settings(max_examples=40, deadline=None)
@given(
    edges=st.integers(3, 8),
    clip=st.floats(1e-3, 100),
    seed=st.integers(0, 2**31),
    beyond=st.floats(0.1, 3),
)
def test_the_masked_sum_is_the_plain_sum(edges: int, clip: float, seed: int, beyond: float) -> None:
    """To half a step of the grid for each edge, clipping included."""
    draw = torch.Generator().manual_seed(seed)
    plain = [
        {"b": torch.randn(3, 5, generator=draw) * clip * beyond, "a": torch.randn(7, generator=draw) * clip}
        for _ in range(edges)
    ]
    vectors = {f"edge-{at}": quantise(each, clip, edges) for at, each in enumerate(plain)}
    total = np.zeros(22, np.uint32)
    for seen in views(vectors).values():
        total = total + seen
    found = average(total, plain[0], clip, edges)
    step = 1 / grid(clip, edges)[0]
    for name, value in found.items():
        wanted = sum(each[name].double().clamp(-clip, clip) for each in plain) / edges
        assert torch.all((value - wanted).abs() <= step + 1e-6 * clip)


@given(clip=st.floats(1e-6, 1024), edges=st.integers(3, MOST_EDGES))
def test_no_sum_can_wrap(clip: float, edges: int) -> None:
    """Whatever the edges hold."""
    scale, limit = grid(clip, edges)
    assert limit * edges < HALF
    assert limit <= clip * scale


def test_extremes_do_not_wrap() -> None:
    """All edges at the clip sum to it, and so at its negative."""
    for sign in (1.0, -1.0):
        ones = {"a": torch.full((4,), sign * 9e9)}
        vectors = {f"e{at}": quantise(ones, 0.7, 5) for at in range(5)}
        total = sum(views(vectors).values(), np.zeros(4, np.uint32))
        assert torch.allclose(average(total, ones, 0.7, 5)["a"], torch.full((4,), sign * 0.7), atol=1e-6)


def test_the_view_of_one_edge_is_uniform_and_would_not_be_without_masks() -> None:
    """The bytes that the server sees pass a test that unmasked ones fail."""
    draw = torch.Generator().manual_seed(5)
    vectors = {name: quantise({"a": torch.randn(50_000, generator=draw) * 1e-3}, 1.0, 3) for name in ("a", "b", "c")}
    assert all(abs(uniform(seen)) < 4 for seen in views(vectors).values())
    assert all(uniform(plain) > 1000 for plain in vectors.values())


def test_masks_are_of_one_attempt_and_of_one_pair() -> None:
    """Nothing is used twice: another attempt, round, run or roster gives other masks."""
    zeros = {name: np.zeros(64, np.uint32) for name in ("a", "b", "c")}
    others = (Attempt(ATTEMPT.run, 3, 8), Attempt(ATTEMPT.run, 4, 7), Attempt("another", 3, 7))
    first = views(zeros)
    for other in others:
        assert not np.any(views(zeros, other)["a"] == first["a"])
    assert not np.array_equal(first["a"], first["b"])
    total = first["a"] + first["b"]
    assert np.any(total)  # two of three hide the third


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    """Before it is rounded."""
    with pytest.raises(RunError, match="not finite"):
        quantise({"a": torch.tensor([0.0, value])}, 1.0, 3)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_a_clip_that_makes_no_sense_is_refused(clip: float) -> None:
    """It names the flag."""
    with pytest.raises(UsageError, match="--clip"):
        grid(clip, 3)


def test_a_sum_that_no_edges_can_have_made_is_refused() -> None:
    """As one of which a mask is left over, or of another length."""
    with pytest.raises(WireError, match="larger than"):
        average(np.array([HALF], np.uint32), {"a": torch.zeros(1)}, 1.0, 3)
    with pytest.raises(WireError, match="other values"):
        average(np.zeros(2, np.uint32), {"a": torch.zeros(1)}, 1.0, 3)


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32)])
def test_a_public_key_that_is_none_is_refused(public: bytes) -> None:
    """All zeros are a point of small order."""
    with pytest.raises(WireError, match="public key"):
        masked(np.zeros(4, np.uint32), "a", key_of("a"), {"b": public}, ATTEMPT, b"")
