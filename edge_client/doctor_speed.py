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
from isthmus.report.units import scaled
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


def backbone(patient: Patient) -> RemoteBackbone:
    """The span's passes over the session that was opened."""
    if patient.passes is None:
        patient.passes = RemoteBackbone(patient.session, patient.ledger, "none", "none")
    return patient.passes


def one_row(tokens: int, wanted: int | None = None) -> Rows:
    """A row of which the last `wanted` tokens come back; None: all."""
    if wanted is None:
        return Rows((tokens,), (0,))
    wanted_N = torch.zeros(tokens, dtype=torch.bool)
    wanted_N[-wanted:] = True
    return Rows((tokens,), (0,), wanted_N)


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
    figures = {"median_s": median, "least_s": least, "most_s": most}
    said = f"{1e3 * median:.2f} ms in the median of {PINGS}, {1e3 * least:.2f} to {1e3 * most:.2f}"
    if most > SPREAD * median and most > 0.1:
        return Verdict(
            "warn", f"{said}: the line stutters; move closer, use a cable, or choose a method that asks less", figures
        )
    return Verdict("pass", said, figures)


def bandwidth(patient: Patient) -> Verdict:
    """Both ways, with random numbers: `MOST_BYTES` each way at most in a request, `MOST_S` seconds in all."""
    span, card = backbone(patient), patient.described
    row_bytes, until = VALUE_BYTES * card.hidden_size, time.monotonic() + MOST_S
    most = min(card.limits.call_bytes // 2, MOST_BYTES) // row_bytes
    tokens = max(1, FIRST_BYTES // row_bytes)
    while True:
        tokens = max(1, min(tokens, most, card.limits.row_tokens, card.limits.call_tokens))
        up, down = _both_ways(patient, span, tokens)
        patient.told(f"bandwidth: {scaled(up.up, 'B')} up, {scaled(down.down, 'B')} down")
        longest = max(up.other_s, down.other_s)
        if longest > ENOUGH_S or 4 * tokens > min(most, card.limits.row_tokens) or time.monotonic() > until:
            break
        tokens *= 4
    return _verdict(up, down)


def _both_ways(patient: Patient, span: RemoteBackbone, tokens: int) -> tuple[OnePass, OnePass]:
    """A request of which one output comes back, and one of which all do."""
    hidden_ND = torch.randn(tokens, patient.described.hidden_size)
    up, _ = timed(patient.ledger, lambda: span.forward(hidden_ND, one_row(tokens, 1), False))
    down, _ = timed(patient.ledger, lambda: span.forward(hidden_ND, one_row(tokens), False))
    return up, down


def _verdict(up: OnePass, down: OnePass) -> Verdict:
    """What goes up takes the first request's time; what comes down, by how much the second took longer."""
    up_rate = up.up / up.other_s
    longer_s = down.other_s - up.other_s
    # Where bringing back takes no longer than noise does, it is as fast as sending at least.
    down_rate = (down.down - up.down) / longer_s if longer_s > 0.1 * up.other_s else up_rate
    figures = {"up_bytes_per_s": up_rate, "down_bytes_per_s": down_rate, "sent_bytes": up.up, "back_bytes": down.down}
    said = f"{8e-6 * up_rate:.3g} Mbit/s up, {8e-6 * down_rate:.3g} Mbit/s down at least"
    return Verdict("pass", f"{said}; `edge_client calibrate` measures more thoroughly", figures)
