"""A split step of every method is the step of plain `peft`, or of plain torch, on the whole model in one process."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.step import Gradients
from edge_client.tuning import Tuning
from tests.harness import Server
from tests.methods.cases import CUT, EACH, Case, named
from tests.parity.reference import (
    BLOCK_LIST,
    connected,
    end_blocks,
    plain_loss,
    ragged_sequences,
    relative,
    set_values,
    trainable,
    whole_model,
)
from tests.parity.test_training import EXACT, in_microbatches, stepping

LENGTHS = (9, 17, 5, 12, 6)


def moved(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values that are not a method's own start, so that every gradient matters."""
    generator = torch.Generator().manual_seed(1)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in values.items()}


def in_one_process(case: Case, family: str, directory: Path) -> nn.Module:
    """The whole model with the same method."""
    whole = whole_model(directory)
    if case.plain is not None:
        torch.manual_seed(0)
        return peft.get_peft_model(whole, case.plain(family)).eval()
    if case.name == "head":
        whole.lm_head.weight = nn.Parameter(whole.lm_head.weight.detach().clone())
        return whole
    for number in end_blocks(CUT):
        for name, parameter in whole.get_submodule(f"{BLOCK_LIST[family]}.{number}").named_parameters():
            parameter.requires_grad_(case.name == "full" or name.endswith("bias"))
    return whole


def placed(edge: EdgeModel, case: Case, **changes: object) -> Tuning:
    given = {"method": "local", "model": "m", "cut": CUT, "data": "unused", "peft": case.name, **case.settings}
    return attach(edge.model, edge.found, edge.cut, TrainConfig.model_validate({**given, **changes}).placement)


def one_step(edge: EdgeModel, tuning: Tuning) -> Gradients:
    with stepping(edge, tuning, 2) as stepper:
        return stepper.gradients(in_microbatches(ragged_sequences(LENGTHS), 2))


@pytest.mark.parametrize(("case", "family"), EACH, ids=named)
def test_loss_and_gradients_equal_those_of_the_same_method_in_one_process(
    case: Case, family: str, servers: dict[str, Server], tiny_models: dict[str, Path]
) -> None:
    whole = in_one_process(case, family, tiny_models[family])
    with connected(servers[family], CUT) as edge:
        tuning = placed(edge, case)
        values = moved(tuning.values())
        tuning.load(values)
        set_values(whole, values)
        ours = one_step(edge, tuning)
    loss, parameters = plain_loss(whole, ragged_sequences(LENGTHS)), trainable(whole)
    theirs = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    assert ours.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert all(gradient.norm() > 0 for gradient in theirs.values()), "something has no gradient: nothing is compared"
    assert relative(ours.by_name, theirs) < EXACT
