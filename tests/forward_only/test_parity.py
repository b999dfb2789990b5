"""Training above the span over a real server is that training in one process, first epoch or not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.step import Gradients
from isthmus.ledger.record import Ledger
from isthmus.training.collate import Batch
from isthmus.training.data import TokenSequence
from isthmus.training.optimizer import Optimizer
from tests.conftest import FAMILIES
from tests.forward_only.edges import Targets, gradients, local_top, plain_top, stirred, top_edge
from tests.harness import Server
from tests.parity.reference import (
    HIDDEN,
    connected,
    padded,
    plain_loss,
    ragged_sequences,
    relative,
    trainable,
    whole_model,
)
from tests.parity.test_generation import generated, prompts
from tests.parity.test_training import (
    AFTER_ADAMW,
    EXACT,
    _without_key_biases,
    assert_same,
    plain_gradients,
    stepping,
)

CUTS = ("0:2", "1:2", "2:1", "2:0")
LENGTHS = (9, 17, 5, 12, 21, 6, 3)
ALL_LINEAR, HEAD_TOO = ("all-linear",), ("all-linear", "lm_head")


def placements() -> Iterator[tuple[str, str, str, Targets, int]]:
    """Family, cut, method, targets and microbatches; Llama's blocks have no biases, and with 2:0 there is the head."""
    for family, first in zip(FAMILIES, (1, 4), strict=True):
        for number, cut in enumerate(CUTS[:-1]):
            turn = first if number % 2 else 5 - first
            yield from ((family, cut, "lora", None, microbatches) for microbatches in (1, 4))
            yield from ((family, cut, "lora", targets, turn) for targets in (ALL_LINEAR, HEAD_TOO))
            yield family, cut, "full", None, turn
            if family == "gpt2":
                yield family, cut, "bitfit", None, 5 - turn
        yield family, CUTS[-1], "lora", None, first


def sequences(seed: int = 0, repeated: bool = True) -> list[TokenSequence]:
    """Rows of unequal length; two of them are one row again."""
    found = ragged_sequences(LENGTHS, seed)
    return [*found, found[2]] if repeated else found


def in_parts(rows: list[TokenSequence], count: int) -> list[list[TokenSequence]]:
    return [rows[start::count] for start in range(count)]


@pytest.mark.parametrize(("family", "cut", "kind", "targets", "microbatches"), placements())
def test_loss_and_every_gradient_equal_those_of_one_process_before_and_after_the_outputs_are_known(
    nodes: dict[str, Server],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    family: str,
    cut: str,
    kind: str,
    targets: Targets,
    microbatches: int,
) -> None:
    rows = sequences()
    parts, ledger = in_parts(rows, microbatches), Ledger()
    here, whole_tuning = local_top(tiny_models[family], cut, kind, targets)
    stirred(whole_tuning)
    local = gradients(here, whole_tuning, parts)
    plain = plain_gradients(plain_top(whole_model(tiny_models[family]), family, cut, kind, targets, whole_tuning), rows)
    with top_edge(nodes[family], cut, tmp_path, kind, targets, ledger) as (edge, tuning):
        stirred(tuning)
        for epoch in range(2):
            crossed = ledger.total("train", "up_payload_bytes")
            ours = gradients(edge, tuning, parts)
            assert (ledger.total("train", "up_payload_bytes") > crossed) == (epoch == 0)
            for theirs in (local, plain):
                if kind == "lora":
                    assert_same(ours, theirs)
                else:
                    assert_same_but_key_biases(ours, theirs)


def assert_same_but_key_biases(ours: Gradients, theirs: Gradients) -> None:
    """The same where a whole gradient may be rounding, as a key bias's is."""
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    found, wanted = _without_key_biases(ours.by_name), _without_key_biases(theirs.by_name)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, f"{name} has no gradient, so nothing is compared"
        assert relative({name: found[name]}, {name: gradient}) < EXACT, name


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_computed_whole_on_either_side_gives_the_same_bits(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, cut: str
) -> None:
    rows = sequences(repeated=False)
    here, whole_tuning = local_top(tiny_models[family], cut)
    stirred(whole_tuning)
    theirs = gradients(here, whole_tuning, [rows])
    with top_edge(nodes[family], cut, tmp_path) as (edge, tuning):
        stirred(tuning)
        for _ in range(2):
            ours = gradients(edge, tuning, [rows])
            assert ours.loss == theirs.loss
            assert all(torch.equal(ours.by_name[name], value) for name, value in theirs.by_name.items())


STEPPED = [
    ("llama", "1:2", "lora", None, 1),
    ("llama", "2:0", "lora", None, 4),
    ("llama", "0:2", "lora", HEAD_TOO, 4),
    ("llama", "2:1", "full", None, 1),
    ("gpt2", "1:2", "lora", None, 4),
    ("gpt2", "2:0", "lora", None, 1),
    ("gpt2", "0:2", "bitfit", None, 4),
    ("gpt2", "2:1", "lora", HEAD_TOO, 1),
    ("gpt2", "1:2", "full", None, 4),
]


@pytest.mark.parametrize(("family", "cut", "kind", "targets", "microbatches"), STEPPED)
def test_five_steps_of_adamw_over_two_epochs_make_the_weights_of_one_process(
    nodes: dict[str, Server],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    family: str,
    cut: str,
    kind: str,
    targets: Targets,
    microbatches: int,
) -> None:
    rate = 1e-2 if kind == "lora" else 1e-3
    here, whole_tuning = local_top(tiny_models[family], cut, kind, targets)
    plain = plain_top(whole_model(tiny_models[family]), family, cut, kind, targets, whole_tuning)
    plain_optimizer = torch.optim.AdamW(trainable(plain).values(), lr=rate, weight_decay=0.0)
    with top_edge(nodes[family], cut, tmp_path, kind, targets) as (edge, tuning):
        before = tuning.values()
        optimizers = [Optimizer(each.trainable, clip_norm=1e9) for each in (tuning, whole_tuning)]
        with stepping(edge, tuning, microbatches) as ours, stepping(here, whole_tuning, microbatches) as theirs:
            for step in range(5):
                rows = sequences(seed=step % 3)
                batches = [Batch.of(part) for part in in_parts(rows, microbatches)]
                for stepper, optimizer in zip((ours, theirs), optimizers, strict=True):
                    optimizer.step(stepper.gradients(batches).by_name, rate)
                plain_optimizer.zero_grad()
                plain_loss(plain, rows).backward()  # type: ignore[no-untyped-call]
                plain_optimizer.step()
        learnt = _without_key_biases(tuning.values())
        assert relative(before, tuning.values()) > 0.005, "five steps that change nothing compare nothing"
        assert relative(learnt, _without_key_biases(whole_tuning.values())) < AFTER_ADAMW
        assert relative(learnt, _without_key_biases(trainable(plain))) < AFTER_ADAMW


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_whole_models_however_a_batch_is_padded_with_and_without_a_mask(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, cut: str
) -> None:
    whole = whole_model(tiny_models[family])
    with connected(nodes[family], cut, train="top", cache=tmp_path) as edge, torch.no_grad():
        for lengths, left in (((9, 9, 9), False), ((9, 5, 12), False), ((9, 5, 12), True)):
            ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences(lengths)], left)
            for given in ways_to_call(mask_BT):
                real = mask_BT.bool() if "attention_mask" in given else torch.ones_like(mask_BT, dtype=torch.bool)
                theirs = whole(ids_BT, **given).logits[real]
                for _ in range(2):
                    ours = edge.model(ids_BT, **given).logits[real]
                    assert relative({"": ours}, {"": theirs}) < EXACT, (lengths, left, list(given))
                    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def ways_to_call(mask_BT: torch.Tensor) -> list[dict[str, Any]]:
    """Arguments beside the token ids; without `use_cache=False` Hugging Face makes a key-value cache."""
    masked, counted_BT = {"attention_mask": mask_BT}, (mask_BT.cumsum(1) - 1).clamp_min(0)
    return [
        masked,
        {**masked, "use_cache": False},
        {"use_cache": False},
        {**masked, "position_ids": counted_BT, "use_cache": False},
        {**masked, "position_ids": counted_BT + 3, "use_cache": False},
    ]


@pytest.mark.parametrize(("family", "cut"), [("llama", "1:2"), ("llama", "2:0"), ("gpt2", "0:2"), ("gpt2", "2:1")])
def test_greedy_text_with_and_without_a_key_value_cache_is_the_whole_models(
    nodes: dict[str, Server], tiny_models: dict[str, Path], tmp_path: Path, family: str, cut: str
) -> None:
    whole = whole_model(tiny_models[family])
    with connected(nodes[family], cut, train="top", cache=tmp_path) as edge:
        for inputs in (prompts(7), prompts(5, 11, 8)):
            theirs = generated(whole, inputs)
            assert torch.equal(generated(edge.model, inputs), theirs)
            assert torch.equal(generated(edge.model, inputs, use_cache=False), theirs)


def test_rows_that_are_the_same_row_cross_once(nodes: dict[str, Server], tmp_path: Path) -> None:
    ledger, rows = Ledger(), sequences()
    with top_edge(nodes["llama"], "1:2", tmp_path, ledger=ledger) as (edge, tuning):
        gradients(edge, tuning, [rows])
    hidden_bytes = 4 * HIDDEN
    tokens = sum(len(row.ids) - 1 for row in rows[:-1])
    assert ledger.total("train", "up_payload_bytes") == hidden_bytes * tokens
    assert ledger.total("train", "down_payload_bytes") == hidden_bytes * tokens
