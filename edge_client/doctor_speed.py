"""How fast the line is, as `doctor` measures it: bounded in bytes and seconds, one number each way.

Knows a session's requests; `edge_client calibrate` measures more thoroughly what plans reckon with.
"""

import statistics
import time
from typing import Final

import torch

from edge_client.examined import Patient, Verdict
from edge_client.passes import RemoteBackbone
from edge_client.timed_line import OnePass, timed
from isthmus.errors import UnreachableError
from isthmus.rows import Rows

PINGS: Final = 11
SPREAD: Final = 5.0
"""The slowest of the pings is no more than so many times the median, on a line that is well."""

FIRST_BYTES: Final = 1 << 16
MOST_BYTES: Final = 4 << 20
"""Sent, and brought back, by the largest request."""

ENOUGH_S: Final = 0.5
"""A request that spent so long on the line tells its speed."""

MOST_S: Final = 10.0
VALUE_BYTES: Final = 4
ROW: Final = 32
"""Tokens of a row: long ones would have the server compute more for the same bytes."""


def backbone(patient: Patient) -> RemoteBackbone:
    """The span's passes over the session that was opened."""
    if patient.passes is None:
        patient.passes = RemoteBackbone(patient.session, patient.ledger, "none", "none")
    return patient.passes


def rows_of(tokens: int, wanted: int | None = None) -> Rows:
    """Rows of `ROW` tokens, and the rest, of which the last `wanted` tokens come back; None: all."""
    lengths = (*(ROW,) * (tokens // ROW), *(rest for rest in (tokens % ROW,) if rest))
    wanted_N = None
    if wanted is not None:
        wanted_N = torch.zeros(tokens, dtype=torch.bool)
        wanted_N[-wanted:] = True
    return Rows(lengths, (0,) * len(lengths), wanted_N)


def round_trip(patient: Patient) -> Verdict:
    """Of the smallest message there is, several times.

    Raises:
        UnreachableError: one was not answered.
    """
    spent = []
    for _ in range(PINGS):
        began = time.perf_counter()
        if patient.session.compare_counts().unchecked_streams:
            raise UnreachableError("the server did not answer in time: check the line, and try again")
        spent.append(time.perf_counter() - began)
    median, least, most = statistics.median(spent), min(spent), max(spent)
    patient.round_trip_s = median
    figures = {"median_s": median, "least_s": least, "most_s": most}
    said = f"{1e3 * median:.2f} ms in the median of {PINGS}, {1e3 * least:.2f} to {1e3 * most:.2f}"
    if most > SPREAD * median and most > 0.1:
        return Verdict(
            "warn", f"{said}: the line stutters; move closer, use a cable, or choose a method that asks less", figures
        )
    return Verdict("pass", said, figures)


def bandwidth(patient: Patient) -> Verdict:
    """Both ways, with random numbers: `MOST_BYTES` each way at most in a request, and no new one after `MOST_S`."""
    limits, row_bytes, until = patient.described.limits, VALUE_BYTES * patient.described.hidden_size, _now() + MOST_S
    most = max(1, min(min(limits.call_bytes // 2, MOST_BYTES) // row_bytes, limits.call_tokens))
    tokens = min(most, max(1, FIRST_BYTES // row_bytes))
    while True:
        up, down = _both_ways(patient, tokens)
        patient.told(f"bandwidth: {up.up / 1e6:.2f} MB up, {down.down / 1e6:.2f} MB down")
        if max(up.other_s, down.other_s) > ENOUGH_S or tokens == most or _now() > until:
            return _verdict(up, down, patient.round_trip_s)
        tokens = min(most, 4 * tokens)


def _now() -> float:
    return time.monotonic()


def _both_ways(patient: Patient, tokens: int) -> tuple[OnePass, OnePass]:
    """A request of which one output comes back, and one of which all do."""
    span, hidden_ND = backbone(patient), torch.randn(tokens, patient.described.hidden_size)
    up, _ = timed(patient.ledger, lambda: span.forward(hidden_ND, rows_of(tokens, 1), False))
    down, _ = timed(patient.ledger, lambda: span.forward(hidden_ND, rows_of(tokens), False))
    return up, down


def _verdict(up: OnePass, down: OnePass, round_trip_s: float) -> Verdict:
    """What goes up takes the first request's time less a round trip; what comes down, what the second took more."""
    up_s = max(up.other_s - round_trip_s, 0.1 * up.other_s)
    longer_s = down.other_s - up.other_s
    up_rate = up.up / up_s
    # Where bringing back takes no longer than noise does, it is as fast as sending at least.
    lost = longer_s < 0.1 * up.other_s
    down_rate = up_rate if lost else (down.down - up.down) / longer_s
    figures = {"up_bytes_per_s": up_rate, "down_bytes_per_s": down_rate, "sent_bytes": up.up, "back_bytes": down.down}
    said = f"{8e-6 * up_rate:.3g} Mbit/s up, {'at least ' if lost else ''}{8e-6 * down_rate:.3g} Mbit/s down"
    return Verdict("pass", f"{said}; `edge_client calibrate` measures more thoroughly", figures)
