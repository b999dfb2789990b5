"""Tiny encoders of text and of pictures, servers of theirs, and rows with labels."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel

from tests.conftest import CUTS
from tests.harness import Server, byte_tokenizer, serving

BLOCKS = 4
IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
SIZES = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 64}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**IDS, **SIZES, **DRY, "max_position_embeddings": 128},
    "roberta": {**IDS, **SIZES, **DRY, "max_position_embeddings": 130},
    "distilbert": {
        **IDS,
        "dim": 32,
        "n_layers": BLOCKS,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
}
PICTURES = {**SIZES, **DRY, "image_size": 16, "patch_size": 4, "initializer_range": 0.15}
LABELS = ("awful", "fine", "great")


def save_encoder(directory: Path, family: str, **settings: Any) -> Path:
    """A random bare encoder; its biases are drawn too, so that each of them matters."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.05)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="package")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved encoder per family, whose tokenizer puts a token before and behind each text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    places = {}
    for family, settings in ENCODERS.items():
        places[family] = save_encoder(tmp_path_factory.mktemp(family) / f"tiny-{family}", family, **settings)
        tokenizer.save_pretrained(places[family])
    places["vit"] = save_encoder(tmp_path_factory.mktemp("vit") / "tiny-vit", "vit", **PICTURES)
    (places["vit"] / "preprocessor_config.json").write_text("{}")
    return places


@pytest.fixture(scope="package")
def served(encoders: dict[str, Path], servers: dict[str, Server], cache: Path) -> Iterator[dict[str, Server]]:
    """A server per family, of encoders and of language models, that offers every cut."""
    flags = [flag for cut in CUTS for flag in ("--cut", cut)]
    with ExitStack() as open_ones:
        yield servers | {
            family: open_ones.enter_context(serving(place, *flags, cache=cache)) for family, place in encoders.items()
        }


@pytest.fixture(scope="package")
def models(encoders: dict[str, Path], tiny_models: dict[str, Path]) -> dict[str, Path]:
    """The folders of those models."""
    return encoders | tiny_models


@pytest.fixture(scope="package")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of differing lengths with one of three labels, which their words tell."""
    words = {"awful": ["bad", "dull"], "fine": ["so so", "ok"], "great": ["a gem", "wonderful"]}
    draws = torch.Generator().manual_seed(0)
    rows = []
    for number in range(24):
        label = LABELS[number % 3]
        picks = torch.randint(0, 2, (1 + number % 4,), generator=draws).tolist()
        rows.append({"text": " and ".join(words[label][pick] for pick in picks), "label": label})
    path = tmp_path_factory.mktemp("data") / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
