"""The linear modules of every family are found with what shares their input, and stand hollow on the edge."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from isthmus.blocks import find_blocks
from isthmus.emulated.forms import Factored, Quantised
from isthmus.linears import Linear, Site, find_linears, linears_in, linears_of
from isthmus.load import outline
from tests.dlora.reference import CUTS, FAMILIES, LLAMA, full_names, span_numbers
from tests.harness import Server
from tests.parity.reference import connected, whole_model
from tests.parity.test_families import FAMILIES as CUTTABLE
from tests.parity.test_families import configuration, save

PARALLEL = {
    "phi": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
        ("self_attn.dense",),
        ("mlp.fc2",),
    ),
    "gptj": (("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)),
    "falcon": (
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    ),
}
"""Attention and what follows it read the same normalised input."""

GROUPS = {
    **{family: about.groups for family, about in FAMILIES.items()},
    **PARALLEL,
    **dict.fromkeys(("mistral", "gemma", "gemma2", "gemma3_text", "olmo2", "qwen2", "smollm3"), LLAMA),
    "mixtral": LLAMA[:2],  # experts are no linear modules
    "phi3": (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    "bloom": (
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
}


def found_in(directory: Path, numbers: list[int]) -> dict[Site, Linear]:
    return linears_of(*outline(directory), numbers)


@pytest.mark.parametrize("family", sorted(CUTTABLE))
def test_modules_that_are_given_one_input_are_found_together(family: str, tmp_path: Path) -> None:
    configuration(family).save_pretrained(tmp_path)
    numbers = [1, 2]
    linears = found_in(tmp_path, numbers)
    groups = {name: set(group) for group in GROUPS[family] for name in group}
    assert {site: set(linear.shared) for site, linear in linears.items()} == {
        (number, name): groups[name] for number in numbers for name in groups
    }
    assert {linear.transposed for linear in linears.values()} == {family == "gpt2"}


@pytest.mark.parametrize("family", sorted(CUTTABLE))
def test_in_a_real_pass_those_found_together_and_no_others_read_the_same_values(family: str, tmp_path: Path) -> None:
    whole = whole_model(save(tmp_path, configuration(family)))
    for vector in (parameter for parameter in whole.parameters() if parameter.dim() == 1):
        nn.init.normal_(vector, 1.0, 0.5)  # two norms that begin alike would read alike
    blocks = find_blocks(whole).blocks
    read: dict[Site, torch.Tensor] = {}
    for (number, name), linear in found_in(tmp_path, [1, 2]).items():
        module = blocks[number].get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, site=(number, name): read.update({site: given[0]}))
        module.register_forward_hook(
            lambda _, given, out, due=linear: _same_sizes(due, given[0], out)  # of what really passes
        )
    with torch.no_grad():
        whole(torch.arange(3, 15)[None])
    for (number, name), linear in found_in(tmp_path, [1, 2]).items():
        mine = read[number, name].flatten()
        equal = {site for site, theirs in read.items() if torch.equal(theirs.flatten(), mine)}
        assert equal == {(number, other) for other in linear.shared}


def _same_sizes(due: Linear, given: torch.Tensor, out: torch.Tensor) -> None:
    assert (due.inputs, due.outputs) == (given.shape[-1], out.shape[-1])


class Shares(nn.Module):
    """A block whose one module runs twice in a pass, and another never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.once(self.twice(self.twice(hidden)))
        return out


def test_a_module_that_does_not_run_once_in_a_pass_is_no_place_for_a_port(tmp_path: Path) -> None:
    configuration("llama").save_pretrained(tmp_path)
    found = find_blocks(AutoModelForCausalLM.from_config(configuration("llama")))
    found.blocks[1] = Shares()
    assert find_linears(found, [1], lambda: found.blocks[1](torch.ones(2, 4))).keys() == {(1, "once")}


class Thin(nn.Module):
    """A block whose modules are an emulator's: made of others, or of few bits."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleDict({"proj": Factored(4, 6, True, 2)})
        self.up_proj, self.down = Quantised(6, 4, False, 4), Factored(4, 4, False, 2, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up_proj(self.up["proj"](hidden)))
        return out


def test_a_linear_module_that_is_made_of_others_is_one(tmp_path: Path) -> None:
    assert list(linears_in(Thin())) == ["up.proj", "up_proj", "down"]
    found = find_blocks(AutoModelForCausalLM.from_config(configuration("llama")))
    found.blocks[2] = Thin()
    assert find_linears(found, [2], lambda: found.blocks[2](torch.ones(2, 4))) == {
        (2, "up.proj"): Linear(4, 6, False, ("up.proj",)),
        (2, "up_proj"): Linear(6, 4, False, ("up_proj",)),
        (2, "down"): Linear(4, 4, False, ("down",)),
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hollow_modules_have_the_real_ones_kind_and_shape_and_none_of_their_values(
    spans: dict[str, Server], homes: dict[str, Path], family: str, cut: str
) -> None:
    whole, names = whole_model(homes[family]), full_names(family, span_numbers(family, cut))
    with connected(spans[family], cut, method="dlora", targets=["all-linear"]) as edge:
        for name in names:
            hollow, real = edge.model.get_submodule(name), whole.get_submodule(name)
            assert isinstance(hollow, Conv1D) == isinstance(real, Conv1D) == (family == "gpt2")
            assert hollow.weight.shape == real.weight.shape
            assert not hollow.weight.any()
            assert hollow.weight.untyped_storage().nbytes() == 4
        ends = full_names(family, [number for number in range(4) if number not in span_numbers(family, cut)][:1])
        for name in ends:
            assert torch.equal(edge.model.get_submodule(name).weight, whole.get_submodule(name).weight)
