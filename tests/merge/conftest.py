"""Tiny models that classify."""

from pathlib import Path

import pytest

from tests.classify.conftest import ENCODERS, PICTURES, save_encoder
from tests.harness import byte_tokenizer


@pytest.fixture(scope="session")
def bases(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models that have no classifier's head, by family."""
    places = dict(tiny_models)
    for family, settings in {**ENCODERS, "vit": PICTURES}.items():
        places[family] = save_encoder(tmp_path_factory.mktemp(family) / f"tiny-{family}", family, **settings)
        if family != "vit":
            byte_tokenizer().save_pretrained(places[family])
    return places
