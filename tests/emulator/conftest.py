"""Tiny models of several families, public text, and emulators built in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from emulator.build import Built, Plan, build
from emulator.calibrate import fill
from emulator.pair import Pair
from emulator.text import read_text
from isthmus.cut import Cut
from isthmus.emulated.shrink import make_recipe
from isthmus.linears import linears_of
from isthmus.load import load_whole, outline
from tests.harness import byte_tokenizer

QUIET = Console(quiet=True)
BLOCKS = 6
CUT = Cut(1, 1)
IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "max_position_embeddings": 256}
OTHERS: dict[str, dict[str, Any]] = {
    "opt": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt_neox": {**WIDE, "intermediate_size": 64},
    "gemma2": {**WIDE, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "bloom": {"hidden_size": 32, "n_layer": BLOCKS, "n_head": 4},
}
FAMILIES = ("llama", "gpt2", *OTHERS)
SENTENCE = "The river that the old bridge crosses is slow, and in {} it carried {} boats past the mill. "

Make = Callable[..., Built]


@pytest.fixture(scope="package")
def homes(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model with its tokenizer per family."""
    places = dict(tiny_models)
    for family, sizes in OTHERS.items():
        places[family] = tmp_path_factory.mktemp(family) / f"tiny-{family}"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**IDS, **sizes}))
        for parameter in (one for one in model.parameters() if one.dim() == 2):
            parameter.data.normal_(0.0, 0.15)
        model.save_pretrained(places[family])
        byte_tokenizer().save_pretrained(places[family])
    return places


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public text, enough that every linear module of a tiny model gets more inputs than it is wide."""
    path = tmp_path_factory.mktemp("text") / "public.txt"
    path.write_text("".join(SENTENCE.format(1800 + 7 * year, year * year % 41) for year in range(24)))
    return path


@pytest.fixture(scope="package")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public text of which enough is held out for an interval, in rows of 48 tokens."""
    path = tmp_path_factory.mktemp("text") / "plenty.txt"
    path.write_text("".join(SENTENCE.format(1800 + 7 * year, year * year % 41) for year in range(140)))
    return path


@pytest.fixture
def make(homes: dict[str, Path], text: Path) -> Make:
    """Build into a folder; everything not given is a tiny Llama, cut 1:1 and the public text in rows of 48 tokens."""

    def made(out: Path, family: str = "llama", resume: bool = False, key: Any = None, **changes: Any) -> Built:
        plan = Plan(**{"model": homes[family], "cut": CUT, "text": text, "max_length": 48, **changes})
        return build(plan, out, key, resume, QUIET)

    return made


def filled(directory: Path, text: Path, cut: Cut = CUT, **settings: Any) -> Pair:
    """A pair whose forms are filled, without a bundle."""
    model, found = outline(directory)
    linears = linears_of(model, found, cut.span(len(found.blocks)))
    recipe = make_recipe(cut=cut, blocks=len(found.blocks), linears=linears, **{"keep": None, "bits": None, **settings})
    pair = Pair.of(*load_whole(directory, dtype=model.dtype), recipe)
    fill(pair, linears, read_text(text, directory, 48).calibration, QUIET)
    return pair


def logits(model: Any) -> torch.Tensor:
    """Of two rows, the second padded."""
    ids_BT = torch.arange(3, 43).reshape(2, 20)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 13:] = 0
    with torch.no_grad():
        return model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[mask_BT.bool()]
