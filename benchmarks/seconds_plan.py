"""The plan of a case's step: its seconds, from what its run says that it moved and computed.

Knows a run's directory, its data and a calibration; runs nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig

from benchmarks.place import Place
from benchmarks.scores import read_json
from benchmarks.seconds_cases import AS_IT_IS, Case
from edge_client.alive import PartOfStep
from edge_client.planned import Planned
from edge_client.runs import RunDirectory
from isthmus.cut import Cut
from isthmus.emulated.recipe import Emulator
from isthmus.load import load_config, load_tokenizer
from isthmus.planning.calibration import Calibration
from isthmus.planning.figures import Crossing, Leg, SideFlops, Step
from isthmus.planning.links import Link
from isthmus.planning.machines import Machine
from isthmus.planning.passes import passes_of
from isthmus.planning.seconds import StepSeconds, step_seconds
from isthmus.planning.workload import Workload
from isthmus.ports import every
from isthmus.training.data import Example, read_examples


def emulator_of(place: Place) -> Path:
    """The folder of the emulator that cases are tuned on."""
    return place.directory / "emulator"


def planned_seconds(
    case: Case,
    place: Place,
    calibration: Calibration,
    spent: Sequence[Mapping[str, Any]],
    run: Path,
    data: Path,
    known: bool,
) -> StepSeconds:
    """Seconds from what crossed and was computed, which plans tell within 1 %: this is about seconds alone."""
    edge, cloud = calibration.edge_at(case.threads), calibration.cloud
    link = Link.parse(case.link) if case.link != AS_IT_IS else calibration.link
    if edge is None or link is None:
        raise RuntimeError("the calibration lacks the device or the line")
    rows = read_examples(data, load_tokenizer(place.model), case.tokens).examples[: case.rows]
    outputs = sum(sum(row.train.counted[1:]) for row in rows)
    config, cut = load_config(place.model), Cut.parse(case.cut)
    passes = passes_of(
        config,
        cut,
        outputs,
        read_json(run / "run.json")["params"]["trainable"],
        _tensors(run / "adapter"),
        forward_only=case.forward_only,
        known=known and case.forward_only,
        beside=_beside(case, cut, config, place),
        whole=case.method == "local",
        legs=_legs(run, config, rows, spent),
        calls=2 if case.method == "side" else 1,
    )
    nobody = Machine.by_hand(1e12)
    return step_seconds(_step(spent), link, edge, cloud or nobody, case.microbatches, passes, calibration.handling)


def _beside(case: Case, cut: Cut, config: PreTrainedConfig, place: Place) -> int:
    """Blocks on the edge that are no end's: an emulator's, or a side network's."""
    if case.method == "offsite":
        return len(Emulator.load(emulator_of(place)).recipe.kept)
    return len(every(case.tap_every, cut, config.num_hidden_layers, 1)) if case.tap_every else 0


def _legs(
    run: Path, config: PreTrainedConfig, rows: Sequence[Example], spent: Sequence[Mapping[str, Any]]
) -> tuple[Leg, ...]:
    """As planned, with the ports that the run kept."""
    settings = RunDirectory(run).config()
    if settings.server is None:
        return ()
    places = [place.partition(".") for line in spent for place in line.get("places", {})]
    active = frozenset((int(block), name) for block, _, name in places if name)
    each = [(len(row.train.ids) - 1, sum(row.train.counted[1:])) for row in rows]
    lengths, losses = zip(*each, strict=True)
    return Planned(settings, config).legs(Workload(lengths, losses), PartOfStep(active))


def _tensors(adapter: Path) -> int:
    """How many parameters a run saved."""
    with safe_open(next(adapter.glob("*.safetensors")), framework="pt") as file:
        return len(file.keys())


def _step(spent: Sequence[Mapping[str, Any]]) -> Step:
    """The mean of what steps cost, as their ledger has it."""

    def mean(name: str) -> float:
        return sum(line.get(name, 0) for line in spent) / len(spent)

    crossing = Crossing(mean("up_bytes"), mean("down_bytes"), mean("round_trips"))
    edge, cloud = (
        SideFlops(mean(f"{side}_forward_flops"), mean(f"{side}_backward_flops")) for side in ("edge", "cloud")
    )
    return Step(crossing, edge, cloud)
