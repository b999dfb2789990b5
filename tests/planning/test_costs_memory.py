"""What is planned is what runs hold: live tensors of both sides at their most, and what is left on the disk."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_client import train as training
from edge_client.config import TrainConfig
from edge_client.placed import place_edge
from edge_client.planned import Planned
from edge_client.planned_memory import Peaks, PlannedMemory
from edge_client.runs import RunDirectory
from isthmus.cut import Cut
from isthmus.emulated.recipe import Recipe
from isthmus.ledger.memory import peak_bytes, reset_peak, resident_bytes
from isthmus.load import DTYPES, load_config, load_tokenizer
from isthmus.planning import configurations
from isthmus.planning.cloud import PlannedSpan
from isthmus.planning.placed import place_span
from isthmus.planning.span_memory import SpanMemory
from isthmus.planning.workload import Workload
from isthmus.training.batches import batch_at
from isthmus.training.data import read_examples
from tests.dlora.near import Near
from tests.harness import save_tiny_model

WITHIN = 0.01
"""Of what is held: all of it can be foreseen."""

BATCH, ROWS, STEPS = 8, 16, 4
WIDE: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 256, "n_head": 8},
}
"""So wide, and 128 tokens long, that activations and logits are most of what is held; the tiny models' weights are."""

BUDGET = 1 << 30


@dataclass(frozen=True)
class Case:
    """One run: its settings beside server, cut and data, of which model, and whether rows differ in length."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=lambda: {"method": "split"})
    family: str = "llama"
    cut: str = "1:1"
    wide: bool = True
    ragged: bool = False
    completions: bool = False


def split(peft: str = "lora", **more: Any) -> dict[str, Any]:
    return {"method": "split", "peft": peft, **more}


def kill_revive(**more: Any) -> dict[str, Any]:
    return {"method": "dlora", "kr_active": 0.25, **more}


SIDE = {"method": "side", "tap_every": 2, "tap_width": 16}
CASES = (
    Case("tiny", wide=False),
    Case("tiny-gpt2-ragged", split(), "gpt2", wide=False, ragged=True),
    Case("wide"),
    Case("wide-gpt2", split(), "gpt2"),
    Case("ragged", ragged=True),
    Case("ragged-gpt2", split(), "gpt2", ragged=True),
    Case("few-losses", completions=True),
    Case("topmost", split(), cut="2:0", completions=True),
    Case("nothing-below", split(), cut="0:2"),
    Case("int8", split(codec="int8")),
    Case("bfloat16", split(dtype="bfloat16")),
    Case("dropout", split(dropout=0.1), ragged=True),
    Case("dora", split("dora"), "gpt2"),
    Case("pissa", split("pissa")),
    Case("adalora", split("adalora")),
    Case("ia3", split("ia3")),
    Case("ln-tuning", split("ln-tuning")),
    Case("prompt", split("prompt", peft_option={"num_virtual_tokens": 5}), ragged=True),
    Case("trainable-tokens", split("trainable-tokens", peft_option={"token_indices": [70, 75]})),
    Case("bitfit", split("bitfit"), "gpt2"),
    Case("full", split("full")),
    Case("head", split("head")),
    Case("top", split(train="top"), cut="0:2", ragged=True),
    Case("side", SIDE, ragged=True),
    Case("dlora", {"method": "dlora"}, ragged=True),
    Case("dlora-lowest", {"method": "dlora", "targets": ["all-linear"]}, "gpt2", cut="0:0"),
    Case("dlora-dropout", {"method": "dlora", "dropout": 0.1}),
    Case("kill-revive", kill_revive(kr_warmup=2)),
    Case("kill-revive-top", kill_revive(kr_criterion="top", kr_idle="park")),
    Case("local", {"method": "local", "peft": "lora"}, ragged=True),
    Case("local-in-all-blocks", {"method": "local", "exchange": "activations"}, "gpt2"),
)
AT_ONCE = (
    Case("split", split(microbatches=4)),
    Case("split-gpt2", split(microbatches=2), "gpt2", ragged=True),
    Case("top", split(train="top", microbatches=4), cut="1:2", ragged=True),
    Case("side", {**SIDE, "microbatches": 2}, ragged=True),
    Case("dlora", {"method": "dlora", "microbatches": 4}),
    Case("local", {"method": "local", "peft": "lora", "microbatches": 4}, ragged=True),
)


@dataclass(frozen=True)
class Made:
    """A finished run: its directory, its cache, its settings, and the rows of each step."""

    path: Path
    cache: Path
    settings: TrainConfig
    model: Path
    workloads: tuple[Workload, ...]

    def planned(self) -> Planned:
        """A plan of it."""
        return Planned(self.settings, load_config(self.model))

    def measured(self) -> Peaks:
        """What it held."""
        cost = json.loads((self.path / "run.json").read_text())["cost"]
        return Peaks(cost["edge"]["peak_tensor_bytes"], cost["cloud"]["peak_tensor_bytes"] or 0)


def made(case: Case, models: Mapping[tuple[str, bool], Path], place: Path, patched: pytest.MonkeyPatch) -> Made:
    model, data = models[case.family, case.wide], write(place / "rows.jsonl", case)
    given = {"data": data, "cut": case.cut, "steps": STEPS, "batch_size": BATCH, **case.settings}
    patched.setenv("ISTHMUS_CACHE", str(place / "cache"))
    near = Near(model, BUDGET, case.cut) if case.settings["method"] != "local" else None
    where = {"server": near.address, "insecure": True} if near is not None else {"model": str(model)}
    settings = TrainConfig.model_validate({**given, **where})
    try:
        training.train(settings, RunDirectory(place / "run"), False, Console(file=io.StringIO()))
    finally:
        if near is not None:
            near.close()
    return Made(place / "run", place / "cache", settings, model, tuple(workloads(settings, model)))


def workloads(settings: TrainConfig, model: Path) -> list[Workload]:
    examples = read_examples(settings.data, load_tokenizer(model), settings.max_length).examples
    lengths = tuple(len(one.train.ids) for one in examples)
    steps = [batch_at(lengths, BATCH, settings.seed, step) for step in range(STEPS)]
    return [
        Workload(
            tuple(lengths[row] - 1 for row in rows), tuple(sum(examples[row].train.counted[1:]) for row in rows), ROWS
        )
        for rows in steps
    ]


def write(path: Path, case: Case) -> Path:
    """Rows of 129 tokens, of which 128 are run; or of fewer, some of them."""
    rows = []
    for number in range(ROWS):
        text = f"{number:03}".ljust((128, 40, 90)[number % 3 if case.ragged else 0], "x")
        rows.append({"prompt": text[:-3], "completion": text[-3:]} if case.completions else {"text": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """A tiny and a wider model of each family."""
    found = {(family, False): place for family, place in tiny_models.items()}
    for family, sizes in WIDE.items():
        found[family, True] = tmp_path_factory.mktemp("wide") / family
        save_tiny_model(found[family, True], family, **sizes)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_holds_what_was_planned(
    case: Case, models: dict[tuple[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(case, models, tmp_path, monkeypatch)
    plan = run.planned()
    costs = [plan.costs(workload) for workload in run.workloads]
    edge, cloud = (max(one.edge_peak_tensor_bytes for one in costs), max(one.cloud_peak_tensor_bytes for one in costs))
    measured = run.measured()
    assert (edge, cloud) == pytest.approx((measured.edge, measured.cloud), rel=WITHIN)
    assert measured.edge > 0


@pytest.mark.parametrize("case", AT_ONCE, ids=lambda case: case.name)
def test_microbatches_hold_together_what_waits_and_one_that_computes(
    case: Case, models: dict[tuple[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(case, models, tmp_path, monkeypatch)
    memory = run.planned().memory
    planned = [memory.peaks(workload) for workload in run.workloads]
    measured = run.measured()
    assert max(one.edge for one in planned) == pytest.approx(measured.edge, rel=WITHIN)
    # A node counts a pass that waits for its turn as it expects it, by the graph before it.
    assert max(one.cloud for one in planned) == pytest.approx(measured.cloud, rel=0.05)


@pytest.mark.parametrize(
    "case", [one for one in CASES if one.name in ("wide", "dora", "top", "side", "full", "kill-revive")]
)
def test_a_run_leaves_on_the_disk_what_was_planned(
    case: Case, models: dict[tuple[str, bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(case, models, tmp_path, monkeypatch)
    storage = run.planned().costs(run.workloads[0]).storage
    newest = max((run.path / "checkpoints").iterdir()).stat().st_size
    assert storage.adapter == pytest.approx(size(run.path / "adapter"), rel=0.03)
    if case.name == "kill-revive":
        assert storage.checkpoint >= 2 * newest  # ports that were dropped have no moments
    else:
        assert storage.checkpoint == pytest.approx(2 * newest, rel=0.03)
    companions = size(run.model) - (run.model / "model.safetensors").stat().st_size
    assert storage.fetched == pytest.approx(size(run.cache / "bundles") - companions, rel=0.01)
    assert storage.cache == pytest.approx(size(run.cache / "outputs"), rel=0.35 if case.ragged else 0.01)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_emulator_is_held_as_its_recipe_makes_it(models: dict[tuple[str, bool], Path]) -> None:
    """In few bits it takes fewer bytes than in whole blocks, and those fewer than the span."""
    settings = TrainConfig.model_validate({"method": "offsite", "data": "rows", "server": "nobody:0"})
    configuration, workload = load_config(models["llama", True]), Workload((32,) * 4, (32,) * 4)

    def edge(**recipe: Any) -> int:
        made_of = Recipe(cut="1:1", **recipe)
        return PlannedMemory(place_edge(settings, configuration, recipe=made_of), settings, None).peaks(workload).edge

    whole = edge(method="drop", blocks=(1, 2, 3, 4))
    assert edge(method="drop", blocks=(1, None, None, 4)) < whole
    assert edge(method="quant", blocks=(1, 2, 3, 4), bits=4) < whole


@pytest.mark.parametrize("method", ["split", "dlora", "side"])
def test_a_model_that_fits_nowhere_is_planned_in_little_memory(method: str) -> None:
    configuration = configurations.read(configurations.find("llama-3-70b"))
    given = {"method": method, "data": "rows", "server": "nobody:0", "cut": "2:2", "dtype": "bfloat16"}
    settings = TrainConfig.model_validate(given)
    if not reset_peak():
        pytest.skip("this system tells no process's peak")
    before = resident_bytes() or 0
    placed = place_edge(settings, configuration)
    span = place_span(configuration, Cut.parse("2:2"), DTYPES["bfloat16"])
    peaks = PlannedMemory(placed, settings, SpanMemory(span, placed.cut)).peaks(Workload((512,) * 8, (64,) * 8))
    assert (peak_bytes() or 0) - before < 1 << 30
    assert peaks.cloud > 120e9  # its weights alone, two bytes each
    assert 8e9 < peaks.edge < 60e9


def test_a_plan_that_was_changed_knows_what_the_cloud_keeps_of_rows_that_were_counted_before() -> None:
    """Its twin counts them after it was made, so that what the twin finds must reach it."""
    configuration = configurations.read(configurations.find("gpt2"))
    settings = TrainConfig.model_validate({"method": "split", "data": "rows", "server": "nobody:0", "cut": "1:1"})
    placed, workload = place_edge(settings, configuration), Workload((20,) * 4, (20,) * 4)
    memory = PlannedMemory(placed, settings, PlannedSpan(configuration, placed.cut, DTYPES["float32"], (), {}).memory)
    twin = memory.changed(settings.model_copy(update={"codec": "int8"}), 1)
    first = memory.peaks(workload)
    assert twin.peaks(workload) == first
