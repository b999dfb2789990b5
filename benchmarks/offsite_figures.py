"""What a run tuned on an emulator says, and the run that goes on from it on the true span.

Knows run directories and emulators' folders; trains nothing.
"""

import json
from pathlib import Path

from benchmarks.forward_figures import VALIDATION
from benchmarks.results import Figure
from benchmarks.scores import ACCURACY, BEFORE, LOSS, differences, read_json, scores
from isthmus.emulated.recipe import Emulator
from isthmus.report.schema import RunReport

TRUE_RUN = "true-steps"
"""Where, in its directory, the run lies that goes on from a run."""

BEFORE_IT = "before"
"""Where, in its directory, a run's scores before training stand as another run's stand after it."""

EMULATOR, TUNED, WITH_STEPS = "untouched emulator", "tuned emulator", "with true steps"
PROTECTION, GAP = "protection: plugged in less tuned emulator", "gap on public text"
SPEED, MEMORY, EDGE = "tokens/s of tuning", "edge, tensors' peak", "edge, tuning"
BUNDLE, ADAPTER, CROSSED, CROSSED_AFTER = "emulator and ends", "adapter", "crossed in tuning", "crossed in true steps"
BUILD, DISTANCE, MINUTES = "building", "distance on public text", "the row took"


def figures(
    run: Path, emulator: Path, validation: float | None, build_seconds: float, seconds: float
) -> dict[str, Figure]:
    """What a row with an emulator came to: accuracy and loss are those of the adapter plugged in.

    Args:
        run: tuned on the emulator.
        emulator: the folder of its bundle.
        validation: the share of right validation rows, plugged in; None: there are none.
        build_seconds: of the emulator.
        seconds: of the whole row.
    """
    plugged, tuned, steps = set_apart(run / TRUE_RUN), scores(run), scores(run / TRUE_RUN)
    return {
        **{score: steps[f"{score} {BEFORE}"] for score in (ACCURACY, LOSS)},
        **{stage_of(EMULATOR, score): tuned[f"{score} {BEFORE}"] for score in (ACCURACY, LOSS)},
        **{stage_of(TUNED, score): tuned[score] for score in (ACCURACY, LOSS)},
        **{stage_of(WITH_STEPS, score): steps[score] for score in (ACCURACY, LOSS)},
        **({} if validation is None else {VALIDATION: Figure(100 * validation, "%")}),
        PROTECTION: differences(plugged, run)[ACCURACY],
        **_spent(RunReport.load(run)),
        CROSSED_AFTER: _crossed(RunReport.load(run / TRUE_RUN)),
        **_built(emulator),
        BUILD: Figure(build_seconds, "s"),
        MINUTES: Figure(seconds / 60, "min"),
    }


def reference_figures(run: Path, seconds: float) -> dict[str, Figure]:
    """What the row on the true span came to: accuracy and loss after training, and before, of the untouched model."""
    set_apart(run)
    return {**scores(run), **_spent(RunReport.load(run)), MINUTES: Figure(seconds / 60, "min")}


def set_apart(run: Path) -> Path:
    """Lay a run's scores before training where those after training are looked for, so that they can be compared."""
    folder = run / BEFORE_IT
    folder.mkdir(exist_ok=True)
    found = {"after": read_json(run / "scores.json")["before"]}
    (folder / "scores.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return folder


def stage_of(stage: str, score: str) -> str:
    """The name of a figure: a score of the emulator, or of what came after plugging in."""
    return f"{stage}, {score}"


def _spent(report: RunReport) -> dict[str, Figure]:
    edge = report.cost.edge
    return {
        SPEED: Figure(report.throughput.train_tokens_per_s or 0, ""),
        MEMORY: Figure((edge.peak_tensor_bytes or 0) / 1e6, "MB"),
        EDGE: Figure(((edge.forward_flops or 0) + (edge.backward_flops or 0)) / 1e12, "TFLOP"),
        ADAPTER: Figure((report.params.stored_bytes or 0) / 1e6, "MB"),
        CROSSED: _crossed(report),
    }


def _crossed(report: RunReport) -> Figure:
    wire = report.cost.wire
    return Figure((wire.up_bytes + wire.down_bytes) / 1e6, "MB")


def _built(emulator: Path) -> dict[str, Figure]:
    bundle = {BUNDLE: Figure(sum(path.stat().st_size for path in emulator.iterdir()) / 1e6, "MB")}
    distance = Emulator.load(emulator).distance
    if distance is None:
        return bundle
    return {**bundle, GAP: Figure(distance.gap, "nats per token"), DISTANCE: Figure(distance.hidden, "")}
