"""docs/truth.md, with what was measured here and now: `python -m tests.truth.page`."""

import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.results import Machine, commit
from tests.truth.framing import Crossing
from tests.truth.namespaces import missing
from tests.truth.runs import CASES, Case, Crossed, site

PAGE = Path(__file__).parents[2] / "docs" / "truth.md"
REMAKE = "python -m tests.truth.page"

INTRODUCTION = """# Does the kernel agree with the ledger?

A run's ledger counts messages as gRPC serialises them. Here a `cloud_node serve` and an `edge_client train` run in a
network namespace each, joined by a virtual cable, with mutual TLS between them, and what either end of the cable has
sent is read from the kernel's counters before the run and after it. Each run is small and its model random; its ledger
has at least 20 MB in the two directions together, beside what it takes to fetch the ends.

- **ledger**: all phases of `ledger.jsonl`, which is what `run.json` says by phase.
- **HTTP/2**: 9 bytes for each frame of 16 KiB. **TLS**: 22 bytes for each record of 16 KiB less 100 bytes, which is
  what gRPC puts into one, and 2 kB each way for each connection.
- **headers**: 66 bytes for each packet that the interface counted: Ethernet 14, IPv4 20, TCP 32 with its timestamps.
  Packets that only acknowledge are among them. Segmentation offload is off (`gso_max_segs 1`), so that a packet is what
  a cable would carry.
- **again**: segments that the kernel sent a second time, as it counts them itself, of 1,448 bytes each.
- **counted**: by the interface of whoever sends. **difference**: ledger, HTTP/2, TLS, headers and again together, less
  what was counted, in percent of it.

Not modelled: windows that are opened and pings of HTTP/2, ARP, options of TCP beside timestamps. `offsite` fetches its
emulator, looks at the true span, and hands in an adapter of the ends' whole weights.

| run | way | ledger | HTTP/2 | TLS | packets | headers | segments again | again | counted | difference |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""

END = """
`{remake}` measures again; the tests carry out the same runs and fail where a direction differs by 2 %. Commit {commit},
{date}, on {machine}.

FLOPs are held against closed formulas in `tests/ledger/test_flops_formulas.py`, for each method and side.
"""


def page(measured: Iterable[tuple[Case, Crossed]]) -> str:
    """The page of these runs."""
    rows = [row for case, crossed in measured for row in _rows(case.name, crossed)]
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        INTRODUCTION + "".join(rows) + END.format(remake=REMAKE, commit=commit()[0], date=date, machine=Machine.here())
    )


def _rows(name: str, crossed: Crossed) -> Iterator[str]:
    yield _row(name, "up", crossed.up)
    yield _row("", "down", crossed.down)
    yield _row("", "both", crossed.both)


def _row(name: str, way: str, found: Crossing) -> str:
    before = (found.ledger, found.http2, found.tls, found.packets, found.headers, found.retransmitted, found.again)
    cells = [name, way, *(f"{figure:,}" for figure in (*before, found.counted)), f"{100 * found.difference:+.3f} %"]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Measure, and write the page."""
    why = missing()
    if why is not None:
        raise SystemExit(why)
    with tempfile.TemporaryDirectory() as place, site(Path(place)) as between:
        PAGE.write_text(page((case, between.run(case)) for case in CASES))


if __name__ == "__main__":
    main()
