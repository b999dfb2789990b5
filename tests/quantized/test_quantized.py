"""A span whose weights are held in few bits is the whole model's with those blocks, and no others, held so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 (without it nothing here can be tested)
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cloud_node.loading import Quantize, load_spans
from isthmus.cut import Cut
from tests.harness import Server, save_tiny_model, serving
from tests.parity.reference import attached, connected, plain_loss, ragged_sequences, relative, trainable
from tests.parity.test_generation import generated, prompts

KINDS: tuple[Quantize, ...] = ("int8", "nf4")
CUTS = ("1:1", "2:0")
EXACT = 1e-5
WIDTH = 128
SIZES = {
    "llama": {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_key_value_heads": 4},
    "gpt2": {"n_embd": WIDTH},
}
CASES = [(family, kind) for family in SIZES for kind in KINDS]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model per family that is wide enough for groups of 64 weights."""
    places = {family: tmp_path_factory.mktemp("wide") / family for family in SIZES}
    for family, place in places.items():
        save_tiny_model(place, family, **SIZES[family])
    return places


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def served(
    request: pytest.FixtureRequest, wide: dict[str, Path], cache: Path
) -> Iterator[tuple[Path, Quantize, Server]]:
    family, kind = request.param
    flags = [flag for cut in CUTS for flag in ("--cut", cut)]
    with serving(wide[family], *flags, "--quantize", kind, cache=cache) as server:
        yield wide[family], kind, server


def reference(directory: Path, kind: Quantize, cut: str) -> Any:
    """The whole model by Hugging Face alone, quantised but for the ends."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    kept = [f"{names[0]}.{number}." for number in Cut.parse(cut).ends(6)]
    settings: dict[str, Any] = {"llm_int8_skip_modules": ["lm_head", *kept]}
    if kind == "int8":
        settings |= {"load_in_8bit": True}
    else:
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantized: Any = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in quantized.modules():
        module.support_avx512bf16_for_cpu = False
    return quantized.requires_grad_(False).eval()


@pytest.mark.parametrize("cut", CUTS)
def test_logits_tokens_and_gradients(served: tuple[Path, Quantize, Server], cut: str) -> None:
    directory, kind, server = served
    whole = reference(directory, kind, cut)
    rows = ragged_sequences((9, 9), seed=0)  # which values int8 holds to be outliers depends on padding too
    with connected(server, cut) as edge:
        assert torch.equal(generated(edge.model, prompts(7)), generated(whole, prompts(7)))
        tuning = attached(edge, kind="full")
        plain_loss(edge.model, rows).backward()
        ours = {name: value.grad for name, value in tuning.trainable.items()}
    theirs = {name: value for name, value in whole.named_parameters() if name in ours}
    for value in theirs.values():
        value.requires_grad_(True)
    plain_loss(whole, rows).backward()
    assert trainable(whole).keys() == ours.keys()
    assert relative(ours, {name: value.grad for name, value in theirs.items()}) < EXACT


def test_its_card_says_so(served: tuple[Path, Quantize, Server]) -> None:
    _, kind, server = served
    with connected(server, "1:1") as edge:
        assert edge.span_dtype == f"float32, {kind} weights"


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_span_in_few_bits_is_held_once_and_is_as_small_as_they_say(
    wide: dict[str, Path], family: str, kind: Quantize
) -> None:
    cuts = [Cut.parse(cut) for cut in CUTS]
    device = torch.device("cpu")
    plain, small = (load_spans(wide[family], cuts, torch.float32, device, how) for how in (None, kind))
    sizes = []
    for spans in (plain, small):
        held = {address: size for span in spans.values() for address, size in span.storages.items()}
        sizes.append(sum(held.values()))
    assert sizes[1] < {"int8": 0.3, "nf4": 0.22}[kind] * sizes[0]
    for cut in cuts:
        assert small[cut].flops == plain[cut].flops
