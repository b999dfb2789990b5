"""A classifier whose middle is elsewhere gives the logits and the gradients of the same classifier in one process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

import edge_client
from cloud_node.ends import ends_bundle
from cloud_node.span import Span
from isthmus.classifier import Head
from isthmus.cut import Cut
from isthmus.errors import CutError, ModelError, UsageError
from isthmus.load import load_config, load_span, load_whole
from isthmus.rows import Rows
from tests.classify.conftest import ENCODERS
from tests.conftest import CUTS
from tests.harness import Server
from tests.parity.reference import padded, ragged_sequences, relative

LABELS = 3
EXACT = 1e-5
TEXT = (*ENCODERS, "llama", "gpt2")


@contextmanager
def connected(server: Server, cut: str) -> Iterator[PreTrainedModel]:
    model = edge_client.connect(server.address, cut=cut, labels=LABELS)
    try:
        yield model
    finally:
        model.edge.close()


def whole(directory: Path) -> PreTrainedModel:
    """The same classifier in one process: its head is drawn from the same seed."""
    return load_whole(directory, torch.float32, Head(LABELS, 0))[0]


def gradients(model: PreTrainedModel, logits_BC: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of what trains on a made-up loss."""
    trains = {name: one for name, one in model.named_parameters() if one.requires_grad}
    loss = cross_entropy(logits_BC, torch.arange(len(logits_BC)) % LABELS)
    return dict(zip(trains, torch.autograd.grad(loss, list(trains.values())), strict=True))


def train_ends(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Let those matrices of `model` train that `like`, of which parts are elsewhere, has as well."""
    here = {name for name, one in like.named_parameters() if one.dim() == 2 and "embed" not in name}
    for name, one in model.named_parameters():
        one.requires_grad_(name in here)


@pytest.mark.parametrize(
    ("family", "padding"),
    [
        (family, padding)
        for family in TEXT
        for padding in ("none", "right", "left")
        if padding != "left" or family not in ENCODERS
    ],
)
@pytest.mark.parametrize("cut", CUTS)
def test_logits_and_gradients_are_those_of_the_whole_classifier_of_texts(
    family: str, cut: str, padding: str, served: dict[str, Server], models: dict[str, Path]
) -> None:
    lengths = (9, 9) if padding == "none" else (9, 5, 12)
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences(lengths)], left=padding == "left")
    theirs = whole(models[family])
    with connected(served[family], cut) as ours:
        found = []
        for model in (ours, theirs):
            train_ends(model, ours)
            model.config.pad_token_id = 0
            logits_BC = model(ids_BT, attention_mask=None if padding == "none" else mask_BT).logits
            found.append((logits_BC.detach(), gradients(model, logits_BC)))
    (logits, grads), (due_logits, due_grads) = found
    assert logits.shape == (len(lengths), LABELS)
    assert relative({"": logits}, {"": due_logits}) < EXACT
    assert grads.keys() == due_grads.keys()
    assert relative(grads, due_grads) < 10 * EXACT


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ENCODERS)
def test_a_bare_encoder_gives_the_whole_ones_hidden_states_where_tokens_are_however_rows_are_padded(
    family: str, cut: str, served: dict[str, Server], models: dict[str, Path]
) -> None:
    theirs, _ = load_whole(models[family], torch.float32)
    ours = edge_client.connect(served[family].address, cut=cut)
    for left in (False, True):
        ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences((9, 5, 12))], left=left)
        here, there = (model(ids_BT, attention_mask=mask_BT)[0][mask_BT.bool()] for model in (ours, theirs))
        assert relative({"": here}, {"": there}) < EXACT
    ours.edge.close()


def test_an_encoders_classifier_is_not_given_padding_where_its_head_reads(served: dict[str, Server]) -> None:
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences((9, 5))], left=True)
    with connected(served["bert"], "1:1") as ours, pytest.raises(CutError, match="pad on the right"):
        ours(ids_BT, attention_mask=mask_BT)


@pytest.mark.parametrize("cut", CUTS)
def test_a_classifier_of_pictures_trains_as_the_whole_one_does(
    cut: str, served: dict[str, Server], models: dict[str, Path]
) -> None:
    pixels_BCHW = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = whole(models["vit"])
    assert isinstance(theirs, AutoModelForImageClassification._model_mapping[type(theirs.config)])
    with connected(served["vit"], cut) as ours:
        losses = []
        for model in (ours, theirs):
            train_ends(model, ours)
            optimizer = torch.optim.SGD((one for one in model.parameters() if one.requires_grad), lr=0.1)
            for _ in range(3):
                loss = cross_entropy(model(pixel_values=pixels_BCHW).logits, torch.tensor([0, 1, 2, 0]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
        assert losses[2] < losses[0]
        assert (Path(ours.name_or_path) / "preprocessor_config.json").is_file()
        with pytest.raises(UsageError, match="tiny-vit reads pictures, not text"):
            _ = ours.edge.tokenizer


def test_the_whole_model_stays_out_of_the_edge_and_no_head_of_the_owners_is_given_away(
    served: dict[str, Server], models: dict[str, Path], tmp_path: Path
) -> None:
    with connected(served["bert"], "1:1") as ours:
        held = {name for name, _ in ours.named_parameters()}
    assert not any(f"layer.{number}." in name for name in held for number in (1, 2))
    owned = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=LABELS)
    nn.init.ones_(owned.classifier.weight)
    owned.save_pretrained(tmp_path)
    with safe_open(ends_bundle(tmp_path, "0" * 64, Cut(1, 1), None, tmp_path) / "model.safetensors", "pt") as given:
        names = list(given.keys())
    assert not any("classifier" in name for name in names)
    anew, found = load_whole(tmp_path, torch.float32, Head(LABELS, 0))
    assert found.new == ("classifier",)
    assert torch.equal(anew.classifier.weight, whole(models["bert"]).classifier.weight)
    assert not torch.equal(
        anew.classifier.weight, load_whole(tmp_path, torch.float32, Head(LABELS, 1))[0].classifier.weight
    )


def test_a_pooler_that_the_files_lack_is_part_of_the_new_head(models: dict[str, Path], tmp_path: Path) -> None:
    family = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=2)
    family.bert.pooler = None
    family.bert.save_pretrained(tmp_path)
    model, found = load_whole(tmp_path, torch.float32, Head(2, 0))
    assert found.new == ("bert.pooler.dense", "classifier")
    assert model.bert.pooler.dense.weight.std() > 0
    family.bert.encoder.layer[0].output = nn.Identity()
    family.bert.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks \d+ weights"):
        load_whole(tmp_path, torch.float32, Head(2, 0))


def test_a_row_of_roberta_is_as_long_as_the_positions_behind_its_padding(served: dict[str, Server]) -> None:
    with connected(served["roberta"], "1:1") as ours:
        longest = ours.edge.longest(10_000)
        assert longest == 130 - 1
        assert ours(torch.ones(1, longest, dtype=torch.long)).logits.shape == (1, LABELS)


def test_a_classifier_knows_the_names_of_its_labels_and_those_of_the_owners_are_none_of_them(
    served: dict[str, Server], tmp_path: Path
) -> None:
    model = edge_client.connect(served["bert"].address, cut="1:1", labels=["bad", "good"])
    assert (model.config.id2label, model.config.label2id) == ({0: "bad", 1: "good"}, {"bad": 0, "good": 1})
    assert edge_client.head(model) == ["classifier"]
    model.edge.close()
    bare = edge_client.connect(served["bert"].address, cut="1:1")
    with pytest.raises(UsageError, match="is no classifier"):
        edge_client.head(bare)
    bare.edge.close()


@pytest.mark.parametrize("labels", [0, 1, -3, True, ["a"], ["a", "a"], ["a", 1], "ab", 2.5])
def test_a_classifier_tells_at_least_two_labels_apart(labels: Any, served: dict[str, Server]) -> None:
    with pytest.raises(UsageError, match="labels"):
        edge_client.connect(served["bert"].address, cut="1:1", labels=labels)


def test_pictures_of_two_sizes_are_not_run_together(models: dict[str, Path]) -> None:
    span = Span(*load_span(models["vit"], Cut(1, 1), torch.float32), Cut(1, 1))
    with pytest.raises(CutError, match="as many parts each; send those of another size apart"):
        span.forward(torch.zeros(5, 32), Rows((2, 3), (0, 0)))


@pytest.mark.parametrize("nested", [False, True])
def test_a_count_of_labels_that_would_fill_memory_with_names_is_refused(nested: bool, tmp_path: Path) -> None:
    settings = {"model_type": "bert", "num_labels": 10**9}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text": settings} if nested else settings)
    )
    with pytest.raises(ModelError, match="num_labels is 1,000,000,000, and may be 100,000"):
        load_config(tmp_path)


def test_an_encoder_keeps_no_keys_and_values(models: dict[str, Path]) -> None:
    span = Span(*load_span(models["bert"], Cut(1, 1), torch.float32), Cut(1, 1))
    with pytest.raises(CutError, match="bert keeps no keys and values; ask for whole rows"):
        span.decode(torch.zeros(2, 32), Rows((2,), (0,)), None)
