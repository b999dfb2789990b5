"""What would make the model useless is refused in one line before its folder is there, and nothing is removed later."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import emulator.saving
from emulator.saving import probe
from isthmus.errors import BundleError, IsthmusError, UsageError
from tests.emulator.adapters import plugged, saved, whole
from tests.emulator.test_plug_in_command import command

LARGE = 1e18


def filled(adapter: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """An adapter without a manifest, holding other values."""
    path = adapter / "adapter_model.safetensors"
    save_file({name: change(value) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return adapter


@pytest.fixture
def large(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A submission whose values are finite, each by itself."""
    return filled(saved(tiny_models["llama"], tmp_path / "adapter", "1:1"), lambda value: torch.full_like(value, LARGE))


@pytest.mark.parametrize("scored", [True, False], ids=["scored", "not scored"])
def test_large_finite_values_are_refused_in_one_line_before_the_folder_appears(
    scored: bool, large: Path, tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    given = ["--model", tiny_models["llama"], "--adapter", large, "--out", tmp_path / "new" / "out"]
    _, error = command(*given, *(["--eval-data", rows] if scored else []))
    assert isinstance(error, BundleError)
    assert "is not finite: have the ends tuned again" in str(error)
    assert "\n" not in str(error)
    assert not list((tmp_path / "new").iterdir())


def test_a_model_that_is_stored_in_half_precision_is_tried_as_it_is_served(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "half"
    half = whole(tiny_models["llama"])
    half.model.layers[0].mlp.down_proj.weight.data[0] = 6e4
    half.half().save_pretrained(model)
    _, changed, made = plugged(model, saved(model, tmp_path / "adapter", "1:1"), tmp_path / "out")
    assert changed.dtype == "float16"
    assert made.dtype == torch.float16
    made.model.layers[5].mlp.down_proj.weight.data[:] = torch.inf
    with pytest.raises(BundleError, match="is not finite"):
        probe(made)


def test_scores_that_are_not_finite_end_in_one_line_that_says_what_stands(
    large: Path, tiny_models: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator.saving, "probe", lambda _: None)
    given = ["--model", tiny_models["llama"], "--adapter", large, "--eval-data", rows]
    _, error = command(*given, "--out", tmp_path / "out")
    assert isinstance(error, IsthmusError)
    assert "finite" in str(error)
    assert str(error).endswith(f"; the plugged-in model stands in {tmp_path / 'out'} all the same")
    assert "\n" not in str(error)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    adapter = saved(tiny_models["llama"], tmp_path / "adapter", "1:1")
    given = ["--model", tiny_models["llama"], "--adapter", adapter, "--out", tmp_path / "out", "--eval-data", rows]
    _, error = command(*given, "--device", "abacus")
    assert isinstance(error, UsageError)
    assert "no device 'abacus' here" in str(error)
    assert not (tmp_path / "out").exists()


def test_the_folder_that_one_stands_in_may_be_plugged_into(
    tiny_models: dict[str, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, here = saved(tiny_models["llama"], tmp_path / "adapter", "1:1"), tmp_path / "here"
    here.mkdir()
    (tmp_path / "model").symlink_to(tiny_models["llama"])
    monkeypatch.chdir(here)
    _, error = command("--model", "../model", "--adapter", adapter, "--out", ".", "--eval-data", rows)
    assert error is None, error
    assert (here / "config.json").is_file()
