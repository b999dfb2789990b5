"""An emulator is what its recipe says, keeps what it can of its span, and is the same however often it is built."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import emulator.build
import emulator.calibrate
from emulator.distil import DistilPlan
from emulator.measure import measure
from emulator.package import open_pair
from emulator.pair import Pair
from emulator.text import read_text
from isthmus import bundle
from isthmus.emulated.load import load_emulated
from isthmus.emulated.recipe import Emulator
from isthmus.errors import InterruptedRunError, ModelError, UsageError
from isthmus.load import load_whole, outline
from isthmus.report.stages import stages_told
from isthmus.training.progress import Meter
from tests.emulator.conftest import BLOCKS, FAMILIES, QUIET, Make, logits
from tests.harness import save_tiny_model

CPU = torch.device("cpu")
SPAN = range(1, BLOCKS - 1)
STEPS = DistilPlan(steps=4, batch_size=2, lr=1e-3, warmup_steps=1, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "drop", "keep": None}, "method drop needs --keep"),
        ({"method": "drop", "keep": 0}, "--keep 0 is neither 1 to 4 blocks"),
        ({"method": "drop", "keep": 5}, "--keep 5 is neither 1 to 4 blocks"),
        ({"method": "share", "keep": 1.0}, "--keep 1.0 is neither"),
        ({"method": "share", "keep": float("nan")}, "--keep nan is neither"),
        ({"method": "rank", "keep": 3}, "3 is not between 0 and 1"),
        ({"method": "rank", "keep": 1.0}, "1.0 is not between 0 and 1"),
        ({"method": "quant", "keep": None}, "method quant takes --bits"),
        ({"method": "quant", "keep": 0.5, "bits": 4}, "and no --keep"),
    ],
)
def test_a_dial_that_does_not_fit_its_method_is_refused(
    settings: dict[str, Any], message: str, make: Make, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["drop", "share"])
def test_an_emulator_that_keeps_every_block_is_the_model_bit_by_bit(
    family: str, method: str, make: Make, homes: dict[str, Path], tmp_path: Path
) -> None:
    built = make(tmp_path / "out", family, method=method, keep=BLOCKS - 2)
    model, _ = load_whole(homes[family], torch.float32)
    assert torch.equal(logits(load_emulated(tmp_path / "out", torch.float32).model), logits(model))
    distance = built.about.distance
    assert distance is not None
    assert (distance.hidden, distance.gap) == (0.0, 0.0)
    assert built.about.weight_bytes == built.span_bytes
    assert built.about.flops_per_token == built.about.span_flops_per_token > 0


def stored_bytes(folder: Path, model: Path, about: Emulator) -> int:
    """Of what the bundle holds of the span's blocks, read from its file."""
    blocks = tuple(f"{outline(model)[1].path}.{number}." for number in about.recipe.kept)
    stored = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in stored.items() if name.startswith(blocks))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "drop", "keep": 2},
        {"method": "share", "keep": 2},
        {"method": "rank", "keep": 0.5},
        {"method": "quant", "bits": 4},
        {"method": "share", "keep": 2, "bits": 8},
        {"method": "rank", "keep": 0.5, "bits": 8},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_is_shipped_is_what_was_measured_in_every_family_and_method(
    family: str, settings: dict[str, Any], make: Make, homes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    built = make(tmp_path / "out", family, **settings)
    pair, manifest = open_pair(tmp_path / "out", homes[family], CPU)
    public = read_text(text, homes[family], 48)
    assert manifest == built.manifest
    assert measure(pair, public.held_out, public.digest, QUIET) == built.about.distance
    assert built.about.weight_bytes == stored_bytes(tmp_path / "out", homes[family], built.about)
    if (settings["method"], settings.get("bits")) != ("rank", 8):  # thin factors are filled up to groups of 64
        assert built.about.weight_bytes < built.span_bytes
    assert Emulator.load(tmp_path / "out") == built.about


def test_dropped_blocks_are_skipped_and_shared_ones_run_in_their_neighbours_place(
    make: Make, homes: dict[str, Path], tmp_path: Path
) -> None:
    by_hand = {"drop": [0, 1, 4, 5], "share": [0, 1, 1, 4, 4, 5]}
    for method, order in by_hand.items():
        make(tmp_path / method, method=method, keep=2)
        model = AutoModelForCausalLM.from_pretrained(homes["llama"]).eval()
        model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in order)
        got = logits(load_emulated(tmp_path / method, torch.float32).model)
        torch.testing.assert_close(got, logits(model))


def test_weights_are_stored_once_under_the_whole_models_names(
    make: Make, homes: dict[str, Path], tmp_path: Path
) -> None:
    make(tmp_path / "out", method="share", keep=1)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    whole = load_file(homes["llama"] / "model.safetensors")
    absent = tuple(f"model.layers.{number}." for number in (1, 3, 4))
    assert stored.keys() == {name for name in whole if not name.startswith(absent)}
    assert all(torch.equal(stored[name], whole[name]) for name in stored)


def test_flops_and_bytes_are_those_of_the_forms(make: Make, tmp_path: Path) -> None:
    about = make(tmp_path / "out", method="rank", keep=0.5).about
    per_block = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "gate": (32, 64), "up": (32, 64)}
    sizes = [*per_block.values(), (64, 32)]
    thin = [(int(0.5 * one * other / (one + other)), one + other) for one, other in sizes]
    assert about.flops_per_token == 4 * sum(2 * rank * both for rank, both in thin)
    assert about.span_flops_per_token == 4 * sum(2 * one * other for one, other in sizes)
    assert about.parameters == 4 * (sum(rank * both for rank, both in thin) + 64)  # and two norms
    assert about.weight_bytes == 4 * about.parameters
    few = make(tmp_path / "few", method="quant", bits=4).about
    assert few.parameters == few.span_parameters == 4 * (sum(one * other for one, other in sizes) + 64)
    grouped = sum(64 // 2 * other + 4 * other for one, other in sizes)  # every module's inputs fit one group
    assert few.weight_bytes == 4 * (grouped + 4 * 64)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_plan_and_key_give_the_same_folder(make: Make, text: Path, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    for name in ("one", "two"):
        make(tmp_path / name, key=key, method="rank", keep=0.5, bits=4, distillation=STEPS, distill=text)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    bundle.verify(tmp_path / "one", key.public_key())


def test_without_a_key_only_the_signature_differs(make: Make, tmp_path: Path) -> None:
    one, two = (make(tmp_path / name, method="drop", keep=2) for name in ("one", "two"))
    assert one.manifest.id == two.manifest.id
    assert {name for name, content in files(tmp_path / "one").items() if files(tmp_path / "two")[name] != content} == {
        bundle.SIGNATURE
    }


def test_the_bundle_says_what_it_is_of_and_holds_what_an_edge_needs(make: Make, tmp_path: Path) -> None:
    manifest = make(tmp_path / "out", "gpt2", method="share", keep=0.5, bits=8).manifest
    assert (manifest.kind, manifest.cut) == ("emulator", "1:1")
    assert {**manifest.about, "made_of": ""} == {"method": "share", "bits": 8, "name": "tiny-gpt2", "made_of": ""}
    names = {entry.name for entry in manifest.files}
    assert names >= {"config.json", "emulator.json", "model.safetensors", "tokenizer.json"}


def test_a_model_stored_in_bfloat16_gives_an_emulator_in_bfloat16_that_is_measured_as_such(
    make: Make, text: Path, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model", "llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    built = make(tmp_path / "out", model=tmp_path / "model", method="rank", keep=0.5, bits=8)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.uint8}
    assert built.about.weight_bytes == sum(
        tensor.nbytes for name, tensor in stored.items() if name.startswith(tuple(f"model.layers.{n}." for n in SPAN))
    )
    pair, _ = open_pair(tmp_path / "out", tmp_path / "model", CPU)
    public = read_text(text, tmp_path / "model", 48)
    assert measure(pair, public.held_out, public.digest, QUIET) == built.about.distance


def test_distillation_is_told_in_the_bundle_and_leaves_its_costs_alone_beside_it(
    make: Make, text: Path, tmp_path: Path
) -> None:
    settings = {"method": "share", "keep": 2, "distill": text, "distillation": replace(STEPS, steps=30)}
    about = make(tmp_path / "out", **settings).about
    told = about.distillation
    assert told is not None
    assert about.distance is not None
    assert (told.steps, told.batch_size, told.lr, told.curve[-1].step) == (30, 2, 1e-3, 30)
    assert told.before.hidden > about.distance.hidden
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.costs.jsonl"}


@contextmanager
def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop a distillation as the user would, after a step."""

    update = Meter.update

    def watched(self: Meter, done: int, note: str = "") -> None:
        update(self, done, note)
        if note.startswith("loss") and done == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "update", watched)
        yield


def test_an_interrupted_build_goes_on_to_the_same_bundle(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"method": "drop", "keep": 2, "distill": text, "distillation": STEPS}
    whole = make(tmp_path / "whole", **settings)
    out = tmp_path / "out"
    with interrupted_after(2, monkeypatch), pytest.raises(InterruptedRunError, match="stopped after step 2"):
        make(out, **settings)
    assert not out.exists()
    with pytest.raises(UsageError, match="go on with --resume, or remove"):
        make(out, **settings)
    resumed = make(out, resume=True, **settings)
    assert resumed.manifest.id == whole.manifest.id
    assert whole.costs is not None
    assert resumed.costs is not None
    spent, once = resumed.costs.ledger, whole.costs.ledger
    for figure in ("cloud_forward_flops", "cloud_backward_flops"):
        assert spent.total("distil", figure) == once.total("distil", figure) > 0, "no step was done twice"
    assert resumed.costs.steps["distil"] == STEPS.steps
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{ending}" for name in ("whole", "out") for ending in ("", ".costs.jsonl")
    }


def test_a_finished_build_is_there_at_once_and_any_other_leaves_the_folder_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path / "out", method="drop", keep=2)
    before = files(tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(UsageError, match="remove it, or name another folder with --out"):
            make(tmp_path / "out", method="drop", keep=3, resume=resume)
    assert files(tmp_path / "out") == before
    monkeypatch.setattr(emulator.build, "load_whole", None)
    for resume in (False, True):
        again = make(tmp_path / "out", method="drop", keep=2, resume=resume)
        assert replace(again, costs=None) == replace(first, costs=None)
        assert again.costs is not None
        assert first.costs is not None
        assert stages_told(again.costs) == stages_told(first.costs)


def test_a_folder_of_something_else_is_refused_and_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"out (exists and holds something|holds something else)"):
            make(tmp_path / "out", method="drop", keep=2, resume=resume)
    assert files(tmp_path / "out") == {"letter.txt": b"dear"}


def test_a_model_whose_weights_are_not_finite_is_refused_in_one_line(make: Make, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"^the model's own loss on the held-out rows is nan: check the model's weights$"
    ):
        make(tmp_path / "out", model=tmp_path / "model", method="drop", keep=2)
    assert not (tmp_path / "out").exists()


def test_an_emulator_whose_loss_is_not_finite_is_refused_in_one_line(
    make: Make, homes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    make(tmp_path / "out", method="quant", bits=8)
    pair, _ = open_pair(tmp_path / "out", homes["llama"], CPU)
    pair.twin_found.blocks[2].mlp.up_proj.scale.data.fill_(torch.nan)
    public = read_text(text, homes["llama"], 48)
    with pytest.raises(ModelError, match=r"^the emulator's loss on the held-out rows is nan .* or distil it with less"):
        measure(pair, public.held_out, public.digest, QUIET)


def test_building_and_measuring_compute_where_they_are_told(
    make: Make, homes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(pair: Pair, *_: Any) -> None:
        seen.extend(one.device.type for one in (*pair.model.parameters(), *pair.twin.parameters()))
        raise InterruptedRunError("far enough")

    with monkeypatch.context() as patch:
        patch.setattr(emulator.build, "fill", watched)
        with pytest.raises(InterruptedRunError):
            make(tmp_path / "out", method="rank", keep=0.5, device=torch.device("meta"))
    assert set(seen) == {"meta"}
    make(tmp_path / "out", method="drop", keep=2)
    pair, _ = open_pair(tmp_path / "out", homes["llama"], torch.device("meta"))
    assert {one.device.type for one in (*pair.model.parameters(), *pair.twin.parameters())} == {"meta"}


def test_what_needs_text_asks_for_it(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="method rank needs public text"):
        make(tmp_path / "out", method="rank", keep=0.5, text=None)
    with pytest.raises(UsageError, match="--minimum-gap needs public text"):
        make(tmp_path / "out", method="drop", keep=2, text=None, minimum_gap=0.1)
    assert make(tmp_path / "out", method="quant", bits=8, text=None).about.distance is None


def test_repeated_blocks_share_their_weights_and_generate_with_a_cache_as_without(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "out", method="share", keep=1, bits=8)
    emulated = load_emulated(tmp_path / "out", torch.float32)
    places = {name: id(one) for name, one in emulated.model.named_parameters(remove_duplicate=False)}
    for name, place in places.items():
        if name.startswith("model.layers.3."):
            assert places[name.replace("layers.3", "layers.2")] == place
    ids_BT = torch.arange(3, 13)[None]
    with torch.no_grad():
        fast, slow = (emulated.model.generate(ids_BT, max_new_tokens=6, use_cache=cache) for cache in (True, False))
    assert torch.equal(fast, slow)
