"""What the split adds to a training step: a step over mutual TLS against the same step in one process.

Knows how to take turns and where time goes. The two models stand in one process, the span in a server of its own; as
the sides never compute at the same time, both use the same number of threads.
"""

import statistics
import time
from dataclasses import dataclass, field

import torch

from benchmarks.batch import Steps, build, settings
from benchmarks.echo import Echo
from benchmarks.place import ROWS, TOKENS, Place
from benchmarks.results import Figure, Outcome, Target
from edge_client.edge_model import EdgeModel
from isthmus.ledger.record import Ledger
from isthmus.load import DTYPES
from isthmus.trust.credentials import Credentials
from isthmus.wire.tensors import pack, unpack

MOST_RATIO = 1.05
MOST_ECHOES = 2.0


@dataclass
class _Seconds:
    """Repeats, each value in seconds."""

    local: list[float] = field(default_factory=list)
    split: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    cloud: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    echo: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def handed(self) -> list[float]:
        """Of each split step, what was neither computing on either side: waiting less cloud compute, and encoding."""
        encoding = 2 * statistics.median(self.encode)
        return [waited - cloud + encoding for waited, cloud in zip(self.waited, self.cloud, strict=True)]


def measure(place: Place, dtype: str) -> Outcome:
    """Local, split and echo in turns, after one round that is not counted."""
    torch.set_num_threads(place.threads)
    with (
        place.node(dtype) as address,
        place.process("benchmarks.echo", "--certs", place.server_certs) as echo_address,
    ):
        ledger = Ledger()
        local = build(settings(method="local", model=str(place.model), dtype=dtype), Ledger())
        split = build(settings(method="split", server=address, certs=place.edge_certs, dtype=dtype), ledger)
        echo = Echo(echo_address, Credentials.load(place.edge_certs))
        try:
            seconds = _take_turns(place, local, split, ledger, echo, DTYPES[dtype])
        finally:
            split.close()
            echo.close()
    return _outcome(seconds)


def _take_turns(
    place: Place, local: EdgeModel, split: EdgeModel, ledger: Ledger, echo: Echo, dtype: torch.dtype
) -> _Seconds:
    hidden_ND = torch.randn(ROWS * TOKENS, split.model.config.hidden_size).to(dtype)
    message = bytes(hidden_ND.nbytes)
    near, far, seconds = Steps(local, Ledger()), Steps(split, ledger), _Seconds()
    for turn in range(place.repeats + 1):
        if turn == 1:
            seconds = _Seconds()
        seconds.local.append(_timed(near))
        before = ledger.totals("train")
        seconds.split.append(_timed(far))
        spent = {name: value - before.get(name, 0) for name, value in ledger.totals("train").items()}
        seconds.waited.append(spent["edge_wait_s"])
        seconds.cloud.append(spent["cloud_forward_s"] + spent["cloud_backward_s"])
        seconds.queued.append(spent["cloud_queue_s"])
        seconds.echo.append(echo.exchange(message, message))
        _code(hidden_ND, seconds)
    return seconds


def _timed(steps: Steps) -> float:
    began = time.perf_counter()
    steps.step()
    return time.perf_counter() - began


def _code(hidden_ND: torch.Tensor, seconds: _Seconds) -> None:
    """Encode and decode one message of the step, alone."""
    began = time.perf_counter()
    header, payload = pack(hidden_ND, "none")
    middle = time.perf_counter()
    seconds.encode.append(middle - began)
    received, middle = bytearray(payload), time.perf_counter()
    unpack(header, received, len(received))
    seconds.decode.append(time.perf_counter() - middle)


def _outcome(seconds: _Seconds) -> Outcome:
    pairs = list(zip(seconds.split, seconds.local, strict=True))
    handed, echo = Figure.of(_ms(seconds.handed), "ms"), Figure.of(_ms(seconds.echo), "ms")
    ratio = Figure.of([split / local for split, local in pairs], "times")
    echoes = Figure.of([mine / its for mine, its in zip(seconds.handed, seconds.echo, strict=True)], "times")
    coding = [4 * (one + other) for one, other in zip(seconds.encode, seconds.decode, strict=True)]
    figures = {
        "a step in one process": Figure.of(seconds.local, "s"),
        "the same step split over TLS": Figure.of(seconds.split, "s"),
        "ratio of the two": ratio,
        "difference of the two": Figure.of(_ms([split - local for split, local in pairs]), "ms"),
        "edge waiting for the cloud": Figure.of(seconds.waited, "s"),
        "of it, the cloud computing": Figure.of(seconds.cloud, "s"),
        "hand-over: waiting less computing, and the edge's encoding": handed,
        "of it, encoding and decoding of all four messages, measured alone": Figure.of(_ms(coding), "ms"),
        "of it, queueing on the cloud": Figure.of(_ms(seconds.queued), "ms"),
        "raw TLS echo of the same messages": echo,
        "hand-over against the echo": echoes,
    }
    return Outcome(figures, (_echo_target(figures, echoes), _ratio_target(figures, ratio)))


def _echo_target(figures: dict[str, Figure], echoes: Figure) -> Target:
    met = echoes.value <= MOST_ECHOES
    coding = figures["of it, encoding and decoding of all four messages, measured alone"].value
    echo = figures["raw TLS echo of the same messages"].value
    handed = figures["hand-over: waiting less computing, and the edge's encoding"].value
    reason = (
        f"of {handed:.1f} ms the bytes' way takes {echo:.1f} ms, finite checks, checksums and copies {coding:.1f} ms; "
        f"the other {handed - echo - coding:.1f} ms are hand-overs between threads and processes on shared cores"
    )
    text = f"the hand-over takes at most {MOST_ECHOES:g} times a raw TLS echo of the same bytes"
    return Target(text, str(echoes), met, None if met else reason)


def _ratio_target(figures: dict[str, Figure], ratio: Figure) -> Target:
    met = ratio.value <= MOST_RATIO
    handed = figures["hand-over: waiting less computing, and the edge's encoding"].value
    slower = figures["difference of the two"].value - handed
    reason = f"the hand-over takes {handed:.1f} ms of the difference; computing itself is {slower:.1f} ms slower split"
    text = f"a split step takes at most {MOST_RATIO} times one in one process"
    return Target(text, str(ratio), met, None if met else reason)


def _ms(seconds: list[float]) -> list[float]:
    return [1000 * value for value in seconds]
