"""Bytes that cross per real token in a training run, against the tensors themselves.

Knows a run's report; the run itself is the product's, on review data of uneven lengths.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.place import CUT, Place
from benchmarks.results import Figure, Outcome, Target
from isthmus.load import load_config

STEPS = 20
MOST_OVERHEAD = 0.01
VALUE_BYTES = {"none": 4, "bf16": 2}


def measure(place: Place, codec: str) -> Outcome:
    """Train for 20 steps with float32 on both sides, and read the report."""
    with place.node("float32") as address, TemporaryDirectory(dir=place.directory) as scratch:
        out = Path(scratch) / "run"
        command = ["edge_client", "train", "--method", "split", "--server", address, "--certs", place.edge_certs]
        flags = ["--cut", CUT, "--data", place.reviews, "--steps", STEPS, "--codec", codec, "--threads", place.threads]
        place.run(*command, *flags, "--out", out)
        report = json.loads((out / "run.json").read_text())
    return _outcome(report, 4 * load_config(place.model).hidden_size * VALUE_BYTES[codec])


def _outcome(report: dict, tensors_per_token: int) -> Outcome:  # type: ignore[type-arg]
    wire, real, padded = report["cost"]["wire"], report["tokens"]["real"], report["tokens"]["padded"]
    total = wire["up_bytes"] + wire["down_bytes"]
    overhead = wire["overhead_bytes"] / (total - wire["overhead_bytes"])
    above = total / real / tensors_per_token - 1
    figures = {
        "real tokens": Figure(real, ""),
        "positions with the padding that does not cross": Figure(padded, ""),
        "bytes up": Figure(wire["up_bytes"], ""),
        "bytes down": Figure(wire["down_bytes"], ""),
        "bytes per real token": Figure(total / real, ""),
        "4 x hidden size x bytes of a value": Figure(tensors_per_token, ""),
        "above it": Figure(100 * above, "%"),
        "overhead: serialised less tensors": Figure(100 * overhead, "%"),
    }
    met = max(above, overhead) < MOST_OVERHEAD
    reason = f"{wire['overhead_bytes'] / wire['round_trips']:.0f} bytes of headers a request, on short rows"
    text = f"overhead under {MOST_OVERHEAD:.0%} of the tensors"
    return Outcome(figures, (Target(text, f"{100 * max(above, overhead):.3f} %", met, None if met else reason),))
