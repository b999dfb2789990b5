"""A classifier's adapter is merged into the classifier that plain peft makes of it, and no other is taken for one."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from edge_client.adapter_folder import save_adapter
from edge_client.attaching import Placement, attach
from emulator.tuned_ends import check
from isthmus import bundle
from isthmus.classifier import Head
from isthmus.cut import Cut
from isthmus.errors import BundleError
from isthmus.load import load_ends, load_span, load_whole, model_digest
from tests.emulator.adapters import EXACT, KEY, apart, outline
from tests.merge.adapters import disturb, merged
from tests.merge.test_command import command
from tests.merge.test_refused import refused

LABELS = 3
WEIGHTS = "adapter_model.safetensors"
HEADS = {"bert": ["classifier"], "distilbert": ["classifier", "pre_classifier"], "llama": ["score"]}
HEADS |= {"gpt2": ["score"], "roberta": ["classifier"], "vit": ["classifier"]}
TARGETS = {"bert": ["query", "value"], "roberta": ["query", "dense"], "distilbert": ["q_lin", "v_lin"]}
TARGETS |= {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "vit": ["q_proj", "v_proj"]}
INNER = {"bert": "intermediate.dense", "distilbert": "lin1", "llama": "down_proj"}
Spoil = Callable[[dict[str, torch.Tensor]], object]


def classifier(directory: Path, labels: int = LABELS) -> PreTrainedModel:
    """Plain transformers' own, whose head is random if the folder holds none."""
    pictures = json.loads((directory / "config.json").read_text())["model_type"] == "vit"
    auto: Any = AutoModelForImageClassification if pictures else AutoModelForSequenceClassification
    model: PreTrainedModel = auto.from_pretrained(directory, num_labels=labels)
    return model.requires_grad_(False).eval()


def logits(model: Any) -> torch.Tensor:
    """Of two rows, or pictures, one by one, so that no token of padding is needed."""
    rows = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).logits
        return torch.cat([model(input_ids=row[None]).logits for row in rows])


def configured(method: str, family: str, **settings: Any) -> peft.PeftConfig:
    given = {
        "task_type": "SEQ_CLS",
        "target_modules": TARGETS[family],
        "modules_to_save": list(HEADS[family]),
        **settings,
    }
    if method == "ia3":
        inner = INNER[family]
        return peft.IA3Config(**{**given, "target_modules": [*TARGETS[family], inner], "feedforward_modules": [inner]})
    return peft.LoraConfig(use_dora=method == "dora", **given)


def made(directory: Path, place: Path, config: peft.PeftConfig, labels: int = LABELS) -> Path:
    """What plain peft saves of a classifier, with values that matter."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(classifier(directory, labels), config)
        disturb(adapted)
        adapted.save_pretrained(place)
    return place


def beside(directory: Path, adapter: Path, labels: int = LABELS) -> Any:
    """Plain peft's classifier with the adapter beside its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(classifier(directory, labels), str(adapter)).eval().get_base_model()


def check_merged(directory: Path, adapter: Path, out: Path, labels: int = LABELS) -> None:
    """The folder says by itself that it is a classifier, of as many labels, and gives what plain peft gives."""
    config = json.loads((out / "config.json").read_text())
    assert "Classification" in config["architectures"][0]
    auto = AutoModelForImageClassification if config["model_type"] == "vit" else AutoModelForSequenceClassification
    ours = auto.from_pretrained(out).eval()
    assert ours.config.num_labels == labels
    theirs = beside(directory, adapter, labels)
    assert logits(ours).shape == (2, labels)
    assert apart(logits(ours), logits(theirs)) < EXACT
    assert apart(logits(ours), logits(classifier(directory, labels))) > 1000 * EXACT, "nothing was merged"


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in ("bert", "distilbert", "llama") for method in ("lora", "dora", "ia3")]
    + [("gpt2", "lora"), ("roberta", "lora"), ("vit", "lora")],
)
def test_a_merged_classifier_gives_plain_pefts_logits(
    family: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(bases[family], tmp_path / "adapter", configured(method, family))
    examined, changed = merged(bases[family], adapter, tmp_path / "out")
    assert examined.labels == LABELS
    assert not changed.untied
    check_merged(bases[family], adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "settings", "labels"),
    [
        ("bert", {"target_modules": "all-linear"}, 2),
        ("bert", {"modules_to_save": ["pooler.dense"]}, LABELS),
        ("bert", {"target_modules": ["query", "word_embeddings"]}, LABELS),
        ("distilbert", {"modules_to_save": None}, 10_000),
        ("llama", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}, LABELS),
        ("llama", {"trainable_token_indices": [4, 9]}, LABELS),
        ("vit", {"task_type": None}, LABELS),
        ("llama", {"task_type": None}, LABELS),
    ],
)
def test_whatever_else_was_trained_goes_in_with_the_head(
    family: str, settings: dict[str, Any], labels: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = made(bases[family], tmp_path / "adapter", configured("lora", family, **settings), labels)
    merged(bases[family], adapter, tmp_path / "out")
    check_merged(bases[family], adapter, tmp_path / "out", labels)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in ("bert", "gpt2") for kind in ("lora", "bitfit", "full", "head")]
    + [("llama", "full"), ("llama", "head"), ("distilbert", "head")]
    + [("vit", "lora"), ("vit", "bitfit"), ("vit", "full"), ("vit", "head")],
)
def test_what_an_edge_saves_of_a_classifier_makes_the_edges_own_model(
    family: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    targets = TARGETS["vit"] if (family, kind) == ("vit", "lora") else None
    adapter, out = saved(bases[family], tmp_path / "adapter", kind, targets), tmp_path / "out"
    told, error = command("--model", bases[family], "--adapter", adapter, "--out", out)
    assert error is None, error
    assert "it is a classifier of 3 labels" in told
    ours = classifier(out)
    whole = load_whole(bases[family], torch.float32, Head(LABELS, 0))
    if kind == "lora":
        expected = beside(bases[family], adapter)
    else:
        expected = whole[0]
        assert not expected.load_state_dict(load_file(adapter / "adapter.safetensors"), strict=False).unexpected_keys
    assert apart(logits(ours), logits(expected)) < EXACT


def saved(directory: Path, place: Path, kind: str, targets: list[str] | None = None) -> Path:
    """What an edge saves of a classifier, with values that matter."""
    ends, found = load_ends(directory, Cut(1, 1), torch.float32, Head(LABELS, 0))
    tuning = attach(ends, found, Cut(1, 1), Placement(kind, None if kind != "lora" else 4, 8.0, targets, seed=0))
    torch.manual_seed(0)
    tuning.load({name: value + 0.1 * torch.randn(value.shape) for name, value in tuning.values().items()})
    save_adapter(tuning, place, directory.name, model_digest(directory), Cut(1, 1), KEY)
    return place


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_merged_classifier_is_served_again_without_its_head_or_an_output_layer_of_its_own(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter, out = made(bases[family], tmp_path / "adapter", configured("lora", family)), tmp_path / "out"
    told, error = command("--model", bases[family], "--adapter", adapter, "--out", out)
    assert error is None, error
    assert f"next: cloud_node serve --model {out} --certs" in told
    assert load_span(out, Cut(1, 1), torch.float32)
    ends, found = load_ends(out, Cut(1, 1), torch.float32)
    assert not found.new
    assert not any(name.startswith(tuple(HEADS[family])) for name, _ in ends.named_parameters())
    anew, found = load_ends(out, Cut(1, 1), torch.float32, Head(5, 0))
    assert found.new == tuple(HEADS[family])
    assert anew.num_labels == 5
    twice = made(out, tmp_path / "again", configured("lora", family))
    merged(out, twice, tmp_path / "twice")
    check_merged(out, twice, tmp_path / "twice")


@pytest.mark.parametrize("saved_whole", [True, False])
def test_a_pooler_that_the_owners_files_lack_is_part_of_the_head(
    saved_whole: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    without = tmp_path / "model"
    model = classifier(bases["bert"])
    model.bert.pooler = None
    model.bert.save_pretrained(without)
    more = {"modules_to_save": ["bert.pooler.dense", "classifier"]} if saved_whole else {}
    adapter = made(without, tmp_path / "adapter", configured("lora", "bert", **more))
    if saved_whole:
        merged(without, adapter, tmp_path / "out")
        check_merged(without, adapter, tmp_path / "out")
    else:
        refused(without, adapter, tmp_path / "out", "trained bert.pooler.dense.bias not whole")


def head_of(values: dict[str, torch.Tensor], last: str = "classifier.weight") -> str:
    return f"base_model.model.{last}"


def reshaped(values: dict[str, torch.Tensor]) -> None:
    values[head_of(values, "classifier.bias")] = torch.zeros(LABELS + 1)


def narrower(values: dict[str, torch.Tensor]) -> None:
    values[head_of(values)] = torch.zeros(LABELS, 31)


def scalar(values: dict[str, torch.Tensor]) -> None:
    values[head_of(values)] = torch.tensor(1.0)


def foreign(values: dict[str, torch.Tensor]) -> None:
    values[head_of(values, "score.weight")] = torch.zeros(LABELS, 32)


def outsider(values: dict[str, torch.Tensor]) -> None:
    values["classifier.weight"] = torch.zeros(LABELS, 32)


def not_a_number(values: dict[str, torch.Tensor]) -> None:
    values[head_of(values)][1, 5] = torch.nan


def many(labels: int) -> Spoil:
    def spoil(values: dict[str, torch.Tensor]) -> None:
        values[head_of(values)] = torch.zeros(labels, 32)
        values[head_of(values, "classifier.bias")] = torch.zeros(labels)

    return spoil


def without_bias(values: dict[str, torch.Tensor]) -> None:
    del values[head_of(values, "classifier.bias")]


def headless(values: dict[str, torch.Tensor]) -> None:
    del values[head_of(values)]
    without_bias(values)


SPOILT: dict[str, tuple[Spoil, str]] = {
    "labels that differ": (reshaped, "classifier.bias has shape (4,) where the model needs (3,)"),
    "another width": (narrower, "classifier.weight has shape (3, 31) where the model needs (3, 32)"),
    "no shape": (scalar, "classifier.weight has shape () where the model needs (3, 32)"),
    "another family's head": (foreign, "holds 'base_model.model.score.weight', which is no part of"),
    "a head beside": (outsider, "holds 'classifier.weight', which is no part of"),
    "not a number": (not_a_number, "classifier.weight holds values that are not finite"),
    "no label": (many(0), "tells 0 labels apart, and may 2 to 10,000"),
    "one label": (many(1), "tells 1 labels apart"),
    "too many labels": (many(10_001), "tells 10001 labels apart"),
    "part of a head": (without_bias, "lacks 'base_model.model.classifier.bias'"),
    "no head": (headless, "holds no head, and says that it is a classifier's"),
}


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(bases["bert"], tmp_path_factory.mktemp("plain") / "adapter", configured("lora", "bert"))


@pytest.mark.parametrize("name", SPOILT)
def test_a_head_that_is_not_the_whole_one_of_this_model_is_refused(
    name: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    spoil, why = SPOILT[name]
    adapter = Path(shutil.copytree(plain, tmp_path / "adapter"))
    values = load_file(adapter / WEIGHTS)
    spoil(values)
    save_file(values, adapter / WEIGHTS, metadata={"format": "pt"})
    refused(bases["bert"], adapter, tmp_path / "out", why)


def test_a_head_that_was_adapted_and_not_trained_whole_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    bare = configured("lora", "vit", task_type=None, modules_to_save=None, target_modules=["classifier"])
    refused(
        bases["vit"],
        made(bases["vit"], tmp_path / "vit", bare),
        tmp_path / "out",
        "holds no head, and this vit has no output",
    )
    listed = made(bases["vit"], tmp_path / "listed", configured("lora", "vit", task_type=None))
    settings = json.loads((listed / "adapter_config.json").read_text())
    (listed / "adapter_config.json").write_text(json.dumps({**settings, "modules_to_save": None}))
    refused(bases["vit"], listed, tmp_path / "out", "trained classifier.bias not whole")


def test_a_manifest_binds_an_encoders_adapter_to_the_ends(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = made(bases["bert"], tmp_path / "adapter", configured("lora", "bert"))
    (adapter / "README.md").unlink(missing_ok=True)
    bundle.write(adapter, "adapter", model_digest(bases["bert"]), "1:1", {"method": "lora"}, KEY)
    refused(bases["bert"], adapter, tmp_path / "out", "adapts bert.encoder.layer.1.attention.self.query, which is in")


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["lora", "full", "head"])
def test_plugging_in_names_merge(kind: str, family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(bases[family], tmp_path / "adapter", kind)
    with pytest.raises(BundleError, match=r"classifier's.* make a whole model of it with `cloud_node merge`") as caught:
        check(adapter, outline(bases[family]))
    assert "\n" not in str(caught.value)


def test_weights_of_the_ends_own_without_the_whole_head_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(bases["bert"], tmp_path / "adapter", "full")
    values = load_file(adapter / "adapter.safetensors")
    for name, value, why in (
        ("classifier.bias", None, "lacks 'classifier.bias'"),
        ("bert.pooler.dense.bias", torch.zeros(32), "holds 'bert.pooler.dense.bias', which is no part of"),
    ):
        spoilt = {other: kept for other, kept in values.items() if other != name}
        save_file(spoilt | ({} if value is None else {name: value}), adapter / "adapter.safetensors")
        for file in ("manifest.json", "manifest.sig"):
            (adapter / file).unlink()
        bundle.write(adapter, "adapter", model_digest(bases["bert"]), "1:1", {"method": "full"}, KEY)
        _, error = command("--model", bases["bert"], "--adapter", adapter, "--out", tmp_path / "out")
        assert isinstance(error, BundleError)
        assert why in str(error)
        assert not (tmp_path / "out").exists()
