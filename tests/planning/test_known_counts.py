"""Trainable parameters, from configurations alone: as papers print them, as they should have, and as runs have them."""

import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from isthmus.errors import UsageError
from isthmus.ledger.memory import peak_bytes, reset_peak, resident_bytes
from isthmus.planning.figures import Trained
from isthmus.planning.trainable import Prefixes, trainable
from tests.harness import tiny_config
from tests.methods.cases import CUT, IN_PEFT, Case
from tests.planning.known_counts import CELLS, HEADS, WIDE, Cell, counted, lora, weights
from tests.planning.known_mistakes import MISTAKES, Mistake
from tests.planning.known_models import outline
from tests.planning.page import PAGE, REMAKE, page
from tests.planning.usual_counts import MODELS, USUAL, Usual, usually, widths

UNITS = {"M": 1_000_000, "K": 1_000, "": 1}


def as_printed(number: float, model: str, figure: str, truncated: bool) -> str:
    """A number in a figure's unit and to its digits."""
    digits, unit = re.fullmatch(r"([\d.,]+)([MK%]?)", figure).groups()
    scaled = Decimal(number) * 100 / weights(model) if unit == "%" else Decimal(number) / UNITS[unit]
    exponent = Decimal(1).scaleb(-len(digits.partition(".")[2]))
    rounded = scaled.quantize(exponent, ROUND_DOWN if truncated else ROUND_HALF_UP)
    return f"{rounded:,}{unit}" if "," in digits else f"{rounded}{unit}"


def named(cell: Cell) -> str:
    return f"{cell.model} {cell.method} {cell.printed[0]}"


@pytest.mark.parametrize("cell", [*CELLS, *(one.cell for one in MISTAKES)], ids=named)
def test_a_count_is_the_one_by_hand_with_the_head_apart(cell: Cell) -> None:
    assert counted(cell) == Trained(adapter=cell.by_hand, head=HEADS.get(cell.model, 0))


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_a_count_rounds_to_what_is_printed(cell: Cell) -> None:
    total = counted(cell).total
    assert [as_printed(total, cell.model, one, cell.truncated) for one in cell.printed] == list(cell.printed)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: named(mistake.cell))
def test_a_figure_that_errs_is_not_the_count_but_what_it_is_said_to_be(mistake: Mistake) -> None:
    cell, (figure,) = mistake.cell, mistake.cell.printed
    for truncated in (True, False):
        assert as_printed(counted(cell).total, cell.model, figure, truncated) != figure
    if mistake.printed_is is not None:
        assert as_printed(mistake.printed_is(), cell.model, figure, cell.truncated) == figure


def test_no_vectors_in_every_block_of_t5_11b_come_to_the_count_of_ia3_that_is_printed() -> None:
    blocks = 24
    shapes = {size for name, one in outline("T5-11B").named_parameters() if "block" in name for size in one.shape}
    assert {size % 1024 for size in shapes - {32, 128}} == {0}  # 32 by 128 are the relative positions
    possible = {as_printed(count * blocks * 1024, "T5-11B", "3.48M", truncated=False) for count in range(1, 1000)}
    assert {"3.47M", "3.49M"} <= possible
    assert "3.48M" not in possible


def test_what_qlora_prints_of_all_parameters_has_the_whole_adapter_in_it() -> None:
    blocks, d, f = 32, 4096, 11008
    packed = blocks * (4 * d * d + 3 * d * f) // 2  # two weights of 4 bits in a byte
    left = 2 * 32000 * d + (2 * blocks + 1) * d
    adapter = trainable(outline("LLaMA-7B"), WIDE).adapter
    assert as_printed(packed + left + adapter, "LLaMA-7B", "3660.3M", truncated=False) == "3660.3M"


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("RoBERTa-base", 124_647_170),
        ("RoBERTa-large", 355_361_794),
        ("T5-base", 222_903_552),
        ("T5-large", 737_668_096),
        ("T5-3B", 2_851_598_336),
        ("T5-11B", 11_307_321_344),
        ("LLaMA-7B", 6_738_415_616),
        ("LLaMA-13B", 13_015_864_320),
    ],
)
def test_the_configurations_are_those_of_the_published_models(model: str, published: int) -> None:
    assert weights(model) == published


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("usual", USUAL, ids=lambda usual: usual.method)
def test_usual_settings_train_what_the_widths_of_a_llama_say(usual: Usual, model: str) -> None:
    assert usually(model, usual) == usual.by_hand(widths(model))


def test_t5_has_no_bias_to_train() -> None:
    assert trainable(outline("T5-small"), "bitfit") == Trained(adapter=0)


@pytest.mark.parametrize("model", ["RoBERTa-base", "RoBERTa-large", "LLaMA-7B", "Llama-3-70B"])
def test_prefixes_of_one_stack_are_those_that_peft_makes(model: str) -> None:
    task = "SEQ_CLS" if model in HEADS else "CAUSAL_LM"
    plain = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=7)
    assert trainable(outline(model), Prefixes(7)) == trainable(outline(model), plain)


def test_a_network_that_makes_prefixes_is_the_one_that_peft_makes() -> None:
    plain = peft.PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=512
    )
    model = outline("RoBERTa-base")
    assert trainable(model, Prefixes(7, bottleneck=512)) == trainable(model, plain)


@pytest.mark.parametrize("model", ["LLaMA-65B", "Llama-3-70B"])
def test_the_largest_models_take_no_memory(model: str) -> None:
    outline.cache_clear()
    reset_peak()
    before = resident_bytes()
    found = trainable(outline(model), WIDE)
    peak = peak_bytes()
    assert before is not None
    assert peak is not None
    assert 4 * found.adapter > 3e9  # bytes that its values would have taken
    assert peak - before < 3e8


@pytest.mark.parametrize(("case", "family"), IN_PEFT, ids=lambda one: one.name if isinstance(one, Case) else one)
def test_a_count_is_what_a_run_trains(case: Case, family: str, tiny_models: dict[str, Path]) -> None:
    given = {"method": "local", "model": str(tiny_models[family]), "cut": CUT, "data": "unused", "peft": case.name}
    config = TrainConfig.model_validate({**given, **case.settings})
    edge = load_local(config)
    trains = attach(edge.model, edge.found, edge.cut, config.placement).count
    assert trainable(_tiny(family), case.plain(family)) == Trained(adapter=trains)


def _tiny(family: str) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


def test_a_model_and_a_configuration_stay_as_they_were() -> None:
    model, told = _tiny("llama"), lora("CAUSAL_LM")
    names, settings = [name for name, _ in model.named_parameters()], told.to_dict()
    trainable(model, told)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert told.to_dict() == settings


def test_settings_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"no_such_module.*name other modules") as refused:
        trainable(_tiny("llama"), lora("CAUSAL_LM", target_modules=["no_such_module"]))
    assert "\n" not in str(refused.value)


def test_prefixes_are_refused_where_keys_are_not_apart() -> None:
    with pytest.raises(UsageError, match=r"k_proj/v_proj.*choose another method"):
        trainable(_tiny("gpt2"), Prefixes(5))


def test_the_page_of_known_values_is_current() -> None:
    made = page()
    assert PAGE.read_text() == made, f"run `{REMAKE}`"
    for mistake in MISTAKES:
        assert mistake.why in made
