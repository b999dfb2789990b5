"""Real runs of tiny models over real servers, and what a plan of each is made from.

The settings are a spread over methods, cuts, PEFT methods, codecs, dtypes, row lengths and microbatches.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedConfig

from edge_client import train as training
from edge_client.config import TrainConfig
from edge_client.runs import RunDirectory
from isthmus.emulated.recipe import Recipe
from isthmus.ledger.record import Ledger, Phase
from isthmus.load import load_config, load_tokenizer
from isthmus.planning.workload import Workload
from isthmus.report.schema import RunReport
from isthmus.training.batches import batch_at
from isthmus.training.data import read_examples
from isthmus.weights import COMPANIONS
from tests.offsite.by_hand import BLOCKS

ROWS, BATCH = 16, 4
RECIPE = Recipe(method="drop", cut="1:1", blocks=BLOCKS["1:1"])
"""Of the emulator that the server of llama offers."""

RAGGED, EVEN, LABELLED = "ragged", "even", "labelled"
"""Data: rows of differing lengths; all of one length, so that it does not matter which step has which; with labels."""

LINEARS = {"targets": ["all-linear"]}
LONG = {"batch_size": 8, "microbatches": 3, "steps": 2}
TWICE = {"steps": 2 * ROWS // BATCH}
"""Two epochs."""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: its own.
        settings: beside server, cut and data.
        family, cut: of the model.
        data: which rows.
    """

    name: str
    settings: Mapping[str, Any]
    family: str = "llama"
    cut: str = "1:1"
    data: str = RAGGED


def _kr(share: float, **settings: Any) -> dict[str, Any]:
    told = {f"kr_{name}": value for name, value in settings.items()}
    return {"method": "dlora", "kr_active": share, "kr_period": 3, "steps": 12, **told}


def _split(peft: str = "lora", **settings: Any) -> dict[str, Any]:
    return {"method": "split", "peft": peft, **settings}


CASES = (
    Case("split", _split()),
    Case("split-topmost", _split(**LONG), cut="2:0"),
    Case("split-nothing-below", _split(codec="bf16"), cut="0:2"),
    Case("split-int8", _split(codec="int8", codec_gradient="fp16", **LONG), "gpt2"),
    Case("split-bfloat16", _split(dtype="bfloat16", codec_gradient="int8")),
    Case("split-classifier", _split(), data=LABELLED),
    Case("prompt", _split("prompt", peft_option={"num_virtual_tokens": 5}, codec="fp16"), cut="2:0"),
    Case("p-tuning", _split("p-tuning", peft_option={"num_virtual_tokens": 3, "encoder_hidden_size": 16}), "gpt2"),
    Case("trainable-tokens", _split("trainable-tokens", peft_option={"token_indices": [70, 75]}), cut="0:0"),
    Case("ln-tuning", _split("ln-tuning"), cut="0:0"),
    Case("bitfit", _split("bitfit"), "gpt2", "2:0"),
    Case("full", _split("full")),
    Case("head", _split("head")),
    Case("adalora", _split("adalora", peft_option={"tinit": 0, "tfinal": 1})),
    Case("dora", _split("dora"), "gpt2"),
    Case("ia3", _split("ia3")),
    Case("pissa", _split("pissa")),
    Case("top", _split(train="top", **TWICE)),
    Case("top-alone", _split(train="top", codec="int8", deterministic=True, **TWICE), "gpt2", "2:0"),
    Case("side", {"method": "side", "tap_every": 1, "tap_width": 8, "codec_port": "int8", **TWICE}),
    Case("dlora", {"method": "dlora"}),
    Case("dlora-lowest", {"method": "dlora", "codec_port": "bf16", **LINEARS}, cut="0:0"),
    Case("dlora-microbatches", {"method": "dlora", "codec": "int8", **LINEARS, **LONG}, "gpt2", "2:0"),
    Case("core", {"method": "dlora", "exchange": "core", "codec": "int8", **LINEARS, **LONG}),
    Case("core-lowest", {"method": "dlora", "exchange": "core", "init": "random", "rank": 4}, "gpt2", "0:0"),
    Case("core-kr-top", _kr(0.5, criterion="top", warmup=1) | {"exchange": "core"}, data=EVEN),
    Case("core-local", {"method": "local", "exchange": "core", "rank": 4}, "gpt2"),
    Case("parameters", {"method": "dlora", "exchange": "parameters", **LINEARS}, cut="0:0"),
    Case("parameters-microbatches", {"method": "dlora", "exchange": "parameters", "codec": "int8", **LONG}, "gpt2"),
    Case("kr-parameters", _kr(0.25, criterion="random") | {"exchange": "parameters"}, data=EVEN),
    Case("kr-random", _kr(0.25, criterion="random"), cut="0:0", data=EVEN),
    Case("kr-top", _kr(0.5, criterion="top", idle="park") | LINEARS, data=EVEN),
    Case("kr-importance", _kr(0.25, warmup=2), "gpt2", data=EVEN),
    Case("kr-parked", _kr(0.5, warmup=1, idle="park", criterion="gradient"), "gpt2", data=EVEN),
    Case("local", {"method": "local", "peft": "lora"}),
    Case("local-in-all-blocks", {"method": "local", "exchange": "activations"}, "gpt2"),
    Case("offsite", {"method": "offsite", "peft": "lora", "emulator": "half"}),
    Case("offsite-watched", {"method": "offsite", "emulator": "half", "watch": 2, "codec": "bf16"}, data=EVEN),
)


@dataclass(frozen=True)
class Made:
    """A finished run, and what a plan of it is told.

    Attributes:
        case: which.
        path: the run's directory.
        settings: its own.
        configuration: of its model.
        workloads: of each step, in order.
        beside: files of its bundle beside weights, with their sizes.
    """

    case: Case
    path: Path
    settings: TrainConfig
    configuration: PreTrainedConfig
    workloads: tuple[Workload, ...]
    beside: Mapping[str, int]

    @property
    def report(self) -> RunReport:
        """Its `run.json`."""
        return RunReport.load(self.path)

    @property
    def emulator(self) -> Recipe | None:
        """What stands in its middle."""
        return RECIPE if self.settings.method == "offsite" else None

    def spent(self, phase: Phase, *figures: str) -> tuple[float, ...]:
        """Figures of a phase, from its ledger."""
        ledger = Ledger.resume(self.path / "ledger.jsonl")
        return tuple(ledger.total(phase, figure) for figure in figures)


@dataclass
class Runs:
    """Makes each run once; every one has a cache of its own, so that all fetch."""

    models: Mapping[str, Path]
    addresses: Mapping[str, str]
    place: Path
    made: dict[str, Made] = field(default_factory=dict)

    def of(self, case: Case) -> Made:
        """A case's run."""
        if case.name not in self.made:
            self.made[case.name] = self._make(case)
        return self.made[case.name]

    def _make(self, case: Case) -> Made:
        place, model = self.place / case.name, self.models[case.family]
        place.mkdir()
        data = write(place / "rows.jsonl", case.data)
        local = case.settings["method"] == "local"
        where = {"model": str(model)} if local else {"server": self.addresses[case.family]}
        given = {"data": data, "cut": case.cut, "steps": 4, "batch_size": BATCH, "lr": 1e-2, **where, **case.settings}
        settings = training.with_labels(TrainConfig.model_validate(given))
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("ISTHMUS_CACHE", str(place / "cache"))
            training.train(settings, RunDirectory(place / "run"), False, Console(file=io.StringIO()))
        sizes = {name: (model / name).stat().st_size for name in COMPANIONS if (model / name).is_file()}
        return Made(case, place / "run", settings, load_config(model), tuple(workloads(settings, model)), sizes)


def workloads(settings: TrainConfig, model: Path) -> list[Workload]:
    """The rows of each step of a run, which are as a function of settings and data."""
    data = read_examples(settings.data, load_tokenizer(model), settings.max_length, settings.labels)
    sequences = [example.train for example in data.examples]
    lengths = tuple(len(one.ids) for one in sequences)
    found = []
    for step in range(settings.count_steps(len(lengths))):
        rows = [sequences[row] for row in batch_at(lengths, settings.batch_size, settings.seed, step)]
        found.append(
            Workload(tuple(len(one.ids) - 1 for one in rows), tuple(sum(one.counted[1:]) for one in rows), len(lengths))
        )
    return found


def write(path: Path, kind: str) -> Path:
    """Rows, no two of which are equal."""
    rows: list[dict[str, object]] = []
    for number in range(ROWS):
        longer = "" if kind == EVEN else " and so on" * (number * 7 % ROWS)
        text = f"row {number:02}{longer}"
        rows.append(
            {"text": text, "label": number % 2} if kind == LABELLED else {"prompt": text, "completion": " done"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
