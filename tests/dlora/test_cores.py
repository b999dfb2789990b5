"""Cores between frozen factors of the cloud's modules train as in one process, and R values a token cross each way."""

from pathlib import Path

import pytest
import torch
from torch import nn

from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.tuning import Tuning
from isthmus.cores import frozen_around
from isthmus.ledger.record import Ledger
from isthmus.linears import Linear
from tests.dlora.cores import LINEAR, by_hand, with_cores
from tests.dlora.reference import CUTS, activate, gradients, overhear, ports
from tests.harness import Server
from tests.parity.reference import ALPHA, ragged_sequences, random_values, relative
from tests.parity.test_training import LENGTHS, assert_same, plain_gradients

EVERY = ("llama", "gpt2")


def drawn_by(tuning: Tuning, home: Path, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of `--init random` at every module, as the local method has them."""
    edge, whole = in_one_process(home, rank, "random")
    assert whole.trainable.keys() == tuning.trainable.keys()
    cores = {
        name.removesuffix(".core.weight"): edge.get_submodule(f"{name.removesuffix('.weight')}")
        for name in whole.trainable
    }
    return {name: (core.get_buffer("down_RI"), core.get_buffer("up_OR")) for name, core in cores.items()}


def in_one_process(home: Path, rank: int, init: str) -> tuple[nn.Module, Tuning]:
    given = {"method": "local", "exchange": "core", "init": init, "rank": rank, "alpha": ALPHA, "targets": [LINEAR]}
    config = TrainConfig.model_validate({**given, "data": "unused", "model": str(home), "cut": "1:1"})
    edge = load_local(config)
    return edge.model, attach(edge.model, edge.found, edge.cut, config.placement)


@pytest.mark.parametrize(
    ("init", "rank", "cut", "microbatches"),
    [
        ("svd", 4, "1:1", 1),
        ("svd", 4, "0:0", 4),
        ("svd", 13, "1:1", 4),
        ("random", 4, "1:1", 4),
        ("random", 3, "0:0", 1),
    ],
)
@pytest.mark.parametrize("family", EVERY)
def test_loss_and_every_cores_gradient_equal_those_of_one_process(
    spans: dict[str, Server], homes: dict[str, Path], family: str, init: str, rank: int, cut: str, microbatches: int
) -> None:
    sequences = ragged_sequences(LENGTHS)
    with with_cores(spans[family], cut, rank, init) as (edge, tuning):
        tuning.load(random_values(tuning.trainable))
        drawn = drawn_by(tuning, homes[family], rank) if init == "random" else None
        whole = by_hand(homes[family], family, rank, tuning.values(), drawn)
        theirs = plain_gradients(whole, sequences)
        assert_same(gradients(edge, tuning, sequences, microbatches), theirs)
        before = plain_gradients(by_hand(homes[family], family, rank, zeros(tuning), drawn), sequences)
        assert abs(before.loss - theirs.loss) > 1e-3 * theirs.loss


def zeros(tuning: Tuning) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in tuning.values().items()}


@pytest.mark.parametrize("cut", CUTS)
def test_r_values_a_token_cross_each_way_at_each_active_port_and_pass(
    servers: dict[str, Server], monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    sequences, rank = ragged_sequences(LENGTHS), 5
    tokens = sum(LENGTHS) - len(LENGTHS)
    heard, crossed = overhear(monkeypatch), {}
    for count in (0, 2, 7) if cut == "1:1" else (2, 7):
        ledger = Ledger()
        with with_cores(servers["llama"], cut, rank, "svd", ledger) as (edge, tuning):
            tuning.load(random_values(tuning.trainable))
            sites = ports(edge).sites[3 : 3 + count]
            wanted = activate(edge, tuning, sites)
            heard.clear()
            gradients(edge, tuning, sequences, 1, wanted)
        ways = {way: int(ledger.total("train", f"{way}_payload_bytes")) for way in ("up", "down")}
        crossed[count] = ways
        assert all(set(one.came) <= {(tokens, rank)} for one in heard)
        unwanted = sum(len(one.came) for one in heard if one.backward and not one.wanted)
        assert bool(unwanted) == (cut == "0:0" and count > 0)
        assert sum(len(one.came) for one in heard) == 2 * count
        assert sum(len(one.answered) for one in heard) == 2 * count - unwanted
    # With no port taking part nothing crosses for ports, so what more crosses is theirs.
    if cut == "1:1":
        for count in (2, 7):
            for way in ("up", "down"):
                assert crossed[count][way] - crossed[0][way] == 4 * rank * tokens * 2 * count


@pytest.mark.parametrize("rank", [4, 16])
def test_int8_at_ports_is_within_its_error_though_a_block_of_values_holds_several_tokens(
    servers: dict[str, Server], rank: int
) -> None:
    sequences, found = ragged_sequences(LENGTHS), {}
    for codec in ("none", "int8"):
        with with_cores(servers["llama"], "1:1", rank, "svd", codec_port=codec) as (edge, tuning):
            tuning.load(random_values(tuning.trainable))
            found[codec] = gradients(edge, tuning, sequences, 1).by_name
    assert 1e-4 < relative(found["int8"], found["none"]) < 0.1


def test_the_factors_are_the_first_part_of_the_weight_and_drawn_ones_are_a_seeds_own() -> None:
    module, site = nn.Linear(24, 40), (3, "mlp.up")
    linear = Linear(24, 40, False, ())
    left, values, right = torch.linalg.svd(module.weight.detach().double(), full_matrices=False)
    for rank in (1, 6, 24):
        frozen = frozen_around(module, linear, site, rank, "svd", 0)
        best_OI = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close((frozen.up_OR @ frozen.down_RI).double(), best_OI, rtol=0, atol=1e-5)
        assert torch.all(frozen.down_RI.gather(1, frozen.down_RI.abs().argmax(1, keepdim=True)) > 0)
    drawn = [frozen_around(module, linear, at, 6, "random", seed) for at, seed in ((site, 1), (site, 1), (site, 2))]
    other = frozen_around(module, linear, (4, "mlp.up"), 6, "random", 1)
    assert torch.equal(drawn[0].down_RI, drawn[1].down_RI)
    assert torch.equal(drawn[0].up_OR, drawn[1].up_OR)
    for one in (drawn[2], other):
        assert relative({"": one.down_RI}, {"": drawn[0].down_RI}) > 0.5
