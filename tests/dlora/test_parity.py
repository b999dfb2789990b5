"""LoRA in every block, those of the cloud included, is over a real server the LoRA of one process.

The other side is the plain model with plain `peft` on module names written down by hand.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from edge_client.tuning import Tuning
from tests.dlora.reference import (
    ALL,
    CUTS,
    FAMILIES,
    activate,
    every_block,
    full_names,
    gradients,
    in_one_process,
    name_of,
    park,
    ports,
    span_numbers,
    with_ports,
)
from tests.harness import Server
from tests.parity.reference import (
    ALPHA,
    RANK,
    plain_lora,
    ragged_sequences,
    random_values,
    relative,
    trainable,
    whole_model,
)
from tests.parity.test_training import (
    EXACT,
    LENGTHS,
    assert_five_steps_agree,
    assert_same,
    plain_gradients,
)

CODECS = {"bf16": (1e-4, 0.03), "int8": (1e-3, 0.2)}
"""Least and greatest relative error of the gradients where a codec is on the ports alone."""


def of_modules(tuning: Tuning, modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """The adapter's values at some modules only."""
    stems = tuple(f"base_model.model.{name}.lora_" for name in modules)
    return {name: value for name, value in tuning.values().items() if name.startswith(stems)}


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_those_of_plain_peft_on_all_linear_modules(
    spans: dict[str, Server], homes: dict[str, Path], family: str, cut: str, microbatches: int
) -> None:
    sequences = ragged_sequences(LENGTHS)
    with with_ports(spans[family], cut, ALL) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        whole = plain_lora(whole_model(homes[family]), family, every_block(family), tuning.values())
        assert_same(gradients(edge, tuning, sequences, microbatches), plain_gradients(whole, sequences))


@pytest.mark.parametrize(("family", "microbatches"), [("llama", 1), *((family, 4) for family in FAMILIES)])
def test_five_steps_of_adamw_make_the_adapter_of_plain_peft(
    spans: dict[str, Server], homes: dict[str, Path], family: str, microbatches: int
) -> None:
    with with_ports(spans[family], "1:1", ALL) as (edge, tuning):
        whole = plain_lora(whole_model(homes[family]), family, every_block(family), tuning.values())
        assert_five_steps_agree(edge, tuning, whole, microbatches)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_initial_adapter_is_that_of_plain_peft_and_of_the_local_method_with_the_same_seed(
    spans: dict[str, Server], homes: dict[str, Path], family: str
) -> None:
    plain = {}
    for seed in (3, 4):
        torch.manual_seed(seed)
        fused = {"fan_in_fan_out": family == "gpt2"}
        modules = every_block(family)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=modules, **fused)
        plain[seed] = trainable(peft.get_peft_model(whole_model(homes[family]), config))
    for cut in CUTS:
        with with_ports(spans[family], cut, ALL, seed=3) as (_, tuning):
            assert_equal(tuning.values(), plain[3])
        assert_equal(in_one_process(homes[family], cut, ALL, seed=3)[1].values(), plain[3])
    assert relative(plain[4], plain[3]) > 0.5


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.nn.Parameter]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_where_only_some_ports_take_part_the_others_add_nothing(
    spans: dict[str, Server], homes: dict[str, Path], family: str, cut: str
) -> None:
    sequences, numbers = ragged_sequences(LENGTHS), span_numbers(family, cut)
    modules = FAMILIES[family].modules
    sites = [(numbers[1], modules[0]), (numbers[1], modules[-1]), (numbers[3], modules[1])]
    ends = [number for number in range(FAMILIES[family].blocks) if number not in numbers]
    names = [*full_names(family, ends), *(f"{FAMILIES[family].path}.{name_of(site)}" for site in sites)]
    with with_ports(spans[family], cut, ALL) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        wanted = activate(edge, tuning, sites)
        whole = plain_lora(whole_model(homes[family]), family, names, of_modules(tuning, names))
        for microbatches in (1, 4):
            ours = gradients(edge, tuning, sequences, microbatches, wanted)
            assert_same(ours, plain_gradients(whole, sequences))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_no_port_taking_part_only_the_ends_adapters_are_there(
    spans: dict[str, Server], homes: dict[str, Path], family: str
) -> None:
    sequences, ids_BT = ragged_sequences(LENGTHS), torch.arange(3, 27).view(2, 12)
    with with_ports(spans[family], "1:1", ALL) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        wanted, names = activate(edge, tuning, []), full_names(family, [0, FAMILIES[family].blocks - 1])
        whole = plain_lora(whole_model(homes[family]), family, names, of_modules(tuning, names))
        assert_same(gradients(edge, tuning, sequences, 4, wanted), plain_gradients(whole, sequences))
    with with_ports(spans[family], "0:0", ALL) as (edge, tuning), torch.no_grad():
        tuning.load(random_values(tuning.trainable))
        plain = whole_model(homes[family])(ids_BT).logits
        assert relative({"": tuning.model(ids_BT).logits}, {"": plain}) > 0.1
        activate(edge, tuning, [])
        assert relative({"": tuning.model(ids_BT).logits}, {"": plain}) < EXACT


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parked_adapters_are_plain_pefts_frozen_ones(
    spans: dict[str, Server], homes: dict[str, Path], family: str, cut: str
) -> None:
    sequences, numbers = ragged_sequences(LENGTHS), span_numbers(family, cut)
    alive = [(number, module) for number in numbers[1:3] for module in FAMILIES[family].modules[:2]]
    with with_ports(spans[family], cut, ALL) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        whole = plain_lora(whole_model(homes[family]), family, every_block(family), tuning.values())
        theirs = plain_gradients(whole, sequences)
        wanted = activate(edge, tuning, alive)
        park(edge, tuning, [site for site in ports(edge).sites if site not in alive])
        for microbatches in (1, 4):
            ours = gradients(edge, tuning, sequences, microbatches, wanted)
            assert_same(ours, replace(theirs, by_name={name: theirs.by_name[name] for name in wanted}))


def test_what_is_parked_replaces_what_was_and_nothing_parked_adds_nothing(
    spans: dict[str, Server], homes: dict[str, Path]
) -> None:
    ids_BT = torch.arange(3, 27).view(2, 12)
    with with_ports(spans["llama"], "0:0", ALL) as (edge, tuning), torch.no_grad():
        tuning.load(random_values(tuning.trainable))
        activate(edge, tuning, [])
        sites = ports(edge).sites
        for parked in (sites[:8], sites[5:20], sites, ()):
            park(edge, tuning, parked)
            names = [f"model.layers.{name_of(site)}" for site in parked]
            whole = whole_model(homes["llama"])
            theirs = plain_lora(whole, "llama", names, of_modules(tuning, names)) if names else whole
            ours, due = tuning.model(ids_BT).logits, theirs(ids_BT).logits
            assert relative({"": ours}, {"": due}) < EXACT, len(parked)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_lossy_codec_at_ports_is_applied_there_and_stays_within_its_error(
    spans: dict[str, Server], homes: dict[str, Path], codec: str
) -> None:
    sequences, found = ragged_sequences(LENGTHS), {}
    for name in ("none", codec):
        with with_ports(spans["llama"], "1:1", ALL, codec_port=name) as (edge, tuning):
            values = random_values(tuning.trainable)
            tuning.load(values)
            found[name] = gradients(edge, tuning, sequences, 1)
    whole = plain_lora(whole_model(homes["llama"]), "llama", every_block("llama"), values)
    theirs = plain_gradients(whole, sequences)
    assert_same(found["none"], theirs)
    least, greatest = CODECS[codec]
    assert least < relative(found[codec].by_name, theirs.by_name) < greatest
    assert found[codec].loss != pytest.approx(theirs.loss, rel=1e-6)
