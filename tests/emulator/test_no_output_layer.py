"""Emulators are of causal language models: what has no output layer is refused by name before anything is read."""

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from isthmus.errors import ModelError
from tests.classify.conftest import ENCODERS, PICTURES, save_encoder
from tests.emulator.test_build_command import run
from tests.harness import byte_tokenizer


@pytest.fixture
def without(homes: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """An encoder of text, one of pictures, and a language model that was saved as a classifier."""
    places = {
        "bert": save_encoder(tmp_path / "bert", "bert", **ENCODERS["bert"]),
        "vit": save_encoder(tmp_path / "vit", "vit", **PICTURES),
        "llama": tmp_path / "llama",
    }
    AutoModelForSequenceClassification.from_pretrained(homes["llama"], num_labels=3).save_pretrained(places["llama"])
    for family in ("bert", "llama"):
        byte_tokenizer().save_pretrained(places[family])
    return places


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_no_emulator_is_built_or_measured_of_what_has_no_output_layer(
    family: str, without: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    given = ["--model", without[family], "--text", text, "--max-length", 48]
    for command in (
        ["build", "--cut", "1:1", "--method", "drop", "--keep", 2, "--out", tmp_path / "out"],
        ["evaluate", "--emulator", tmp_path / "out"],
    ):
        with pytest.raises(ModelError, match=r"has no output layer .*, and emulators are of causal language models"):
            run(*command, *given)
    assert not list(tmp_path.glob("*out*"))
