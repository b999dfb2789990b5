"""A call of a model whose outputs are kept gets its own answer: that of the whole model, whatever came before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from edge_client.edge_model import EdgeModel
from isthmus.ledger.record import Ledger
from tests.cache.training import entries
from tests.harness import Server, byte_tokenizer, serving
from tests.parity.reference import connected, padded, ragged_sequences, relative, whole_model
from tests.parity.test_families import EXACT, configuration, save

CUT = "1:2"
PADDED = ("llama", "gpt2", "opt", "bloom", "falcon")
LENGTHS = (9, 6, 12)


@contextmanager
def keeping(server: Server, kept: Path, ledger: Ledger | None = None) -> Iterator[EdgeModel]:
    """An edge that answers from its cache."""
    with connected(server, CUT, ledger, train="top", cache=kept) as edge:
        yield edge


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids_BT, **arguments).logits
    return found


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return relative({"": ours}, {"": theirs}) < EXACT


def token_ids(seed: int) -> torch.Tensor:
    return torch.tensor([sequence.ids for sequence in ragged_sequences((10, 10), seed=seed)])


# After a call that was interrupted


def interrupted(edge: EdgeModel, ids_BT: torch.Tensor) -> None:
    """A call during which the user presses Ctrl-C, while a block above the span runs."""

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    hook = edge.found.blocks[-1].register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        logits(edge.model, ids_BT, use_cache=False)
    hook.remove()


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}], ids=["use_cache left at its default", "another row"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_interrupted_call_leaves_nothing_to_the_next(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, arguments: dict[str, Any]
) -> None:
    whole, other = whole_model(tiny_models[family]), token_ids(seed=2)
    with keeping(nodes[family], tmp_path) as edge:
        for _ in range(2):
            interrupted(edge, token_ids(seed=1))
            assert alike(logits(edge.model, other, **arguments), logits(whole, other, **arguments))


# Padded on the left


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> dict[str, Path]:
    """A saved tiny model of each family."""
    made = dict(tiny_models)
    for family in PADDED:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), configuration(family))
            byte_tokenizer().save_pretrained(made[family])
    return made


@pytest.fixture(scope="module", params=PADDED)
def offered(
    request: pytest.FixtureRequest, nodes: dict[str, Server], places: dict[str, Path], cache: Path
) -> Iterator[tuple[PreTrainedModel, Server]]:
    """A whole model, and a server of it."""
    whole = whole_model(places[request.param])
    if request.param in nodes:
        yield whole, nodes[request.param]
        return
    with serving(places[request.param], "--cut", CUT, cache=cache) as server:
        yield whole, server


def assert_cold_and_warm(
    offered: tuple[PreTrainedModel, Server], kept: Path, ids_BT: torch.Tensor, real_BT: torch.Tensor, **arguments: Any
) -> None:
    """A first call and the same again equal the whole model's; the second asks for nothing."""
    whole, server = offered
    expected, ledger = logits(whole, ids_BT, use_cache=False, **arguments), Ledger()
    with keeping(server, kept, ledger) as edge:
        for _ in ("cold", "warm"):
            assert alike(logits(edge.model, ids_BT, use_cache=False, **arguments)[real_BT], expected[real_BT])
            assert ledger.total("train", "fetched_rows") == len(ids_BT)
    assert ledger.total("train", "cached_rows") == len(ids_BT)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_rows_padded_with_a_mask_alone_are_answered_as_by_the_whole_model(
    offered: tuple[PreTrainedModel, Server], tmp_path: Path, left: bool
) -> None:
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences(LENGTHS, seed=1)], left)
    assert_cold_and_warm(offered, tmp_path, ids_BT, mask_BT.bool(), attention_mask=mask_BT)


def test_rows_padded_on_the_left_with_positions_are_answered_so_and_not_as_those_without(
    offered: tuple[PreTrainedModel, Server], tmp_path: Path
) -> None:
    whole, _ = offered
    if "position_ids" not in signature(whole.base_model.forward).parameters:
        pytest.skip("this family takes no positions")
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences(LENGTHS, seed=1)], left=True)
    columns_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)  # which some families would not derive themselves
    given = {"attention_mask": mask_BT, "position_ids": columns_BT}
    assert_cold_and_warm(offered, tmp_path, ids_BT, mask_BT.bool(), **given)
    assert_cold_and_warm(offered, tmp_path, ids_BT, mask_BT.bool(), attention_mask=mask_BT)


# With more than a key holds


def test_a_call_with_an_argument_that_no_key_holds_is_computed_and_leaves_no_entry(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    whole, ids_BT, ledger = whole_model(tiny_models["gpt2"]), token_ids(seed=1), Ledger()
    typed = {"token_type_ids": torch.full_like(ids_BT, 5), "use_cache": False}
    with keeping(nodes["gpt2"], tmp_path, ledger) as edge:
        for known in (False, True):
            assert alike(logits(edge.model, ids_BT, **typed), logits(whole, ids_BT, **typed))
            assert len(entries(tmp_path)) == (len(ids_BT) if known else 0)
            assert ledger.total("train", "cached_rows") == 0
            assert alike(logits(edge.model, ids_BT, use_cache=False), logits(whole, ids_BT, use_cache=False))
        assert ledger.total("train", "cached_rows") == len(ids_BT)
    assert not alike(logits(whole, ids_BT, **typed), logits(whole, ids_BT))
