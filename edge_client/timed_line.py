"""How fast a line and the span behind it are: small and large requests to a server, timed.

Knows requests that training sends too, and what a server says of its own computing; knows no model and no file.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from edge_client.config import TrainConfig
from edge_client.link import Link
from edge_client.opening import credentials_for, opening_of, required
from edge_client.passes import RemoteBackbone
from edge_client.server import choose_cut, describe
from isthmus.errors import UnreachableError
from isthmus.ledger.record import Ledger
from isthmus.load import DTYPES
from isthmus.planning.calibration import Line
from isthmus.planning.fitting import Timed, not_negative, pass_speed, undisturbed
from isthmus.planning.machines import Speed
from isthmus.planning.seconds import Handling
from isthmus.rows import Rows
from isthmus.settings import validated
from isthmus.wire.gen import backbone_pb2 as pb
from isthmus.wire.tensors import pack, unpack

SIZES = ((1, 1), (1, 16), (1, 64), (4, 64), (8, 128), (8, 256))
"""Rows of a request, and tokens of each."""

LONGEST_S = 2.0
"""Larger requests than one that took longer are left out."""

ROUNDS = 7
PINGS = 20
FASTEST = 1e12
"""Bytes a second; a line whose own time is within what handling takes counts as this fast."""

CODED_BYTES = 1 << 22
"""Of a tensor whose handling is timed on this side."""

Told = Callable[[int, int], None]
"""Told how many requests were timed, and how many there will be."""


Result = TypeVar("Result")


class Flops(NamedTuple):
    """Of one request, on the cloud."""

    forward: float
    backward: float


@dataclass(frozen=True)
class OnePass:
    """One request: seconds on the cloud and of everything else, FLOPs there, and bytes that crossed."""

    other_s: float
    cloud_s: float
    flops: Flops
    up: float
    down: float


@dataclass(frozen=True)
class Served:
    """A line and what is behind it, as measured."""

    line: Line
    cloud: Speed
    handling: Handling


def time_handling(dtype: str) -> float:
    """Seconds that encoding, checking and decoding take for each byte of a tensor, on this device."""
    tensor = torch.randn(CODED_BYTES // DTYPES[dtype].itemsize).to(DTYPES[dtype])
    spent = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        header, payload = pack(tensor, "none")
        unpack(header, bytearray(payload), payload.nbytes)
        spent.append(time.perf_counter() - began)
    return undisturbed(spent) / tensor.nbytes


def time_line(config: TrainConfig, told: Told) -> Served:
    """Time the line to `config.server` and the span behind it.

    Raises:
        IsthmusError: whatever stands in the way, each with its remedy.
    """
    address, ledger = required(config.server, "--server"), Ledger()
    credentials = credentials_for(config, address)
    card = describe(address, credentials, ledger)
    cut, _ = choose_cut(card, config.cut)
    opening = opening_of(config, cut, card, (), False)
    link = Link(address, credentials, opening, ledger, card.limits, config.patience, config.pace)
    remote = RemoteBackbone(link, ledger, config.codec, config.gradient_codec)
    try:
        link.open()
        round_trip_s = _round_trip(link)
        asking = _Asking(remote, ledger, card, DTYPES[config.dtype])
        requests = asking.times(told)
    finally:
        link.close()
    return _fitted(requests, round_trip_s, len(cut.span(card.blocks)), time_handling(config.dtype))


def settings(server: str, **given: object) -> TrainConfig:
    """What opens a session as a run with `--method split` would."""
    told = {name: value for name, value in given.items() if value is not None}
    return validated(TrainConfig, {"method": "split", "data": os.devnull, "server": server, **told})


def _round_trip(link: Link) -> float:
    """Of the smallest message there is: each side's count of bytes."""
    spent = []
    for _ in range(PINGS):
        began = time.perf_counter()
        if link.compare_counts().unchecked_streams:
            raise UnreachableError("the server did not answer in time; check the line, and try again")
        spent.append(time.perf_counter() - began)
    return undisturbed(spent)


class _Asking:
    """Requests of several sizes, one after another."""

    def __init__(self, remote: RemoteBackbone, ledger: Ledger, card: pb.ModelCard, dtype: torch.dtype) -> None:
        self._remote, self._ledger = remote, ledger
        self._width, self._dtype = card.hidden_size, dtype
        limits = card.limits
        room = min(limits.call_tokens, limits.call_bytes // (2 * self._width * dtype.itemsize))
        self._sizes = [(rows, min(tokens, limits.row_tokens)) for rows, tokens in SIZES if rows * tokens <= room]

    def times(self, told: Told) -> list[OnePass]:
        """What each size took, whatever disturbed it left out."""
        sizes = list(self._not_too_long())
        spent: list[list[list[OnePass]]] = [[] for _ in sizes]
        for turn in range(ROUNDS):
            for number, size in enumerate(sizes):
                spent[number].append(self._ask(*size))
                told(turn * len(sizes) + number + 1, ROUNDS * len(sizes))
        return [_least_disturbed(repeats) for turns in spent for repeats in zip(*turns, strict=False)]

    def _not_too_long(self) -> Iterator[tuple[int, int]]:
        """Sizes until one takes long; each is asked for once, which warms both sides up."""
        for size in self._sizes:
            began = time.perf_counter()
            self._ask(*size)
            yield size
            if time.perf_counter() - began > LONGEST_S:
                return

    def _ask(self, count: int, tokens: int) -> list[OnePass]:
        """A forward of which one output comes back, one of which all do, and the backward of that if it was kept."""
        hidden_ND = torch.randn(count * tokens, self._width).to(self._dtype)
        lengths, starts = (tokens,) * count, (0,) * count
        wanted_N = torch.zeros(count * tokens, dtype=torch.bool)
        wanted_N[-1] = True
        few, all_ = Rows(lengths, starts, wanted_N), Rows(lengths, starts)
        upwards, _ = timed(self._ledger, lambda: self._remote.forward(hidden_ND, few, False))
        forward, (output_KD, sent) = timed(self._ledger, lambda: self._remote.forward(hidden_ND, all_, True))
        if not sent.kept:
            return [upwards, forward]
        backward, _ = timed(self._ledger, lambda: self._remote.backward(sent, torch.ones_like(output_KD)))
        return [upwards, forward, backward]


def timed(ledger: Ledger, call: Callable[[], Result]) -> tuple[OnePass, Result]:
    """One request that is counted in `ledger`, phase `train`, timed; and its result."""
    before, began = ledger.totals("train"), time.perf_counter()
    result = call()
    clock, after = time.perf_counter() - began, ledger.totals("train")
    spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
    computed = spent["cloud_forward_s"] + spent["cloud_backward_s"]
    other = clock - computed - spent["cloud_queue_s"]
    flops = Flops(spent["cloud_forward_flops"], spent["cloud_backward_flops"])
    return OnePass(max(1e-6, other), max(1e-9, computed), flops, spent["up_bytes"], spent["down_bytes"]), result


def _least_disturbed(repeats: Sequence[OnePass]) -> OnePass:
    other, cloud = (undisturbed([getattr(one, name) for one in repeats]) for name in ("other_s", "cloud_s"))
    return replace(repeats[0], other_s=other, cloud_s=cloud)


def _fitted(requests: Sequence[OnePass], round_trip_s: float, span: int, byte_s: float) -> Served:
    """What explains the requests: the line, the span's speed, and what handling takes beside both."""
    rows = [[1.0, one.up, one.down] for one in requests]
    each_s, up_s, down_s = not_negative(rows, [one.other_s for one in requests], needed=(0,))
    forward = [Timed(span, one.flops.forward, 0.0, one.cloud_s) for one in requests if not one.flops.backward]
    backward = [Timed(span, one.flops.backward, 0.0, one.cloud_s) for one in requests if one.flops.backward]
    speed = pass_speed(forward, apart=False)
    cloud = Speed(forward=speed, backward=pass_speed(backward, apart=False) if backward else speed)
    line = Line(round_trip_s=round_trip_s, up=_rate(up_s - byte_s), down=_rate(down_s - byte_s))
    return Served(line, cloud, Handling(request_s=max(0.0, each_s - round_trip_s), byte_s=byte_s))


def _rate(byte_s: float) -> float:
    return min(FASTEST, 1 / max(byte_s, 1 / FASTEST))
