"""Classifiers trained by the command's own code: as in one process, resumed, read by plain `peft`, scored and used."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from edge_client import train as training
from edge_client.config import TrainConfig
from edge_client.finished import Using, continue_prompt, evaluate
from edge_client.predicting import predict
from edge_client.prefetch import prefetch
from edge_client.runs import RunDirectory
from isthmus.errors import DataError, InterruptedRunError, UsageError
from isthmus.load import load_tokenizer
from isthmus.report.schema import RunReport
from tests.classify.conftest import LABELS
from tests.harness import Server
from tests.methods.conftest import carry_out
from tests.methods.test_runs import asked_after
from tests.parity.reference import relative
from tests.parity.test_training import AFTER_ADAMW

QUIET = Console(quiet=True)
STEPS = 4
Settings = Callable[..., TrainConfig]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}),
    ("llama", {}),
    ("gpt2", {"targets": ["all-linear"]}),
    ("roberta", {"peft": "dora"}),
    ("distilbert", {"peft": "bitfit"}),
    ("bert", {"peft": "full"}),
    ("llama", {"peft": "head"}),
    ("bert", {"peft": "ln-tuning"}),
    ("roberta", {"method": "dlora", "targets": ["query", "value"]}),
]


HEADS = {"bert": ["classifier"], "llama": ["score"], "gpt2": ["score"], "roberta": ["classifier"]}


def named(value: object) -> str:
    if isinstance(value, dict):
        return "-".join([value.get("method", ""), value.get("peft", "lora")]).strip("-")
    return str(value)


@pytest.fixture(scope="package")
def configured(served: dict[str, Server], models: dict[str, Path], labelled: Path) -> Settings:
    """Settings of a run on the labelled rows, over the wire or in one process."""

    def make(family: str, here: bool = False, **changes: Any) -> TrainConfig:
        given = {"method": "split", "data": labelled, "eval_data": labelled, "cut": "1:1", "steps": STEPS, **changes}
        where: dict[str, Any] = {"server": served[family].address}
        if here:
            where = {"method": "local", "model": str(models[family])}
            where |= {"exchange": "activations"} if given["method"] == "dlora" else {}
        more = {"batch_size": 4, "lr": 1e-2, "deterministic": True, "checkpoint_every": 2}
        return TrainConfig.model_validate({**more, **given, **where})

    return make


@pytest.fixture(scope="package")
def made(configured: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a run, made once."""
    runs: dict[str, Path] = {}

    def make(family: str, settings: dict[str, Any], here: bool = False) -> Path:
        key = f"{family} {settings} {here}"
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run") / "run"
            carry_out(configured(family, here, **settings), runs[key], counted=not here)
        return runs[key]

    return make


def values(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize(("family", "settings"), CASES, ids=named)
def test_a_run_over_the_wire_makes_the_adapter_head_and_scores_of_a_run_in_one_process(
    family: str, settings: dict[str, Any], made: Callable[..., Path]
) -> None:
    split, local = made(family, settings), made(family, settings, here=True)
    ours, theirs = values(split), values(local)
    assert relative(ours, theirs) < AFTER_ADAMW
    here, there = RunReport.load(split), RunReport.load(local)
    assert here.eval.after.loss == pytest.approx(there.eval.after.loss, rel=1e-3)
    assert here.eval.before.accuracy == there.eval.before.accuracy
    assert here.eval.before.loss != here.eval.after.loss
    assert here.params.head == there.params.head > 0
    if "peft" not in settings:
        saved = json.loads((split / "adapter" / "adapter_config.json").read_text())
        assert saved["modules_to_save"] == HEADS[family]
    if "dlora" not in settings.values():
        assert here.params.changed == pytest.approx(there.params.changed, rel=0.02)
        assert here.params.changed >= here.params.head
    assert here.cost.edge.forward_flops > 0


@pytest.mark.parametrize(("family", "settings"), [CASES[0], CASES[6], CASES[8]], ids=named)
def test_a_run_that_was_stopped_resumes_to_the_same_bits(
    family: str,
    settings: dict[str, Any],
    made: Callable[..., Path],
    configured: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "stopping", lambda: asked_after(4))
        with pytest.raises(InterruptedRunError):
            carry_out(configured(family, **settings), out)
    assert 0 < RunReport.load(out).steps < STEPS
    assert RunDirectory(out).config().labels == LABELS
    carry_out(RunDirectory(out).config(), out, resume=True)
    ours, undisturbed = values(out), values(made(family, settings))
    assert ours.keys() == undisturbed.keys()
    assert all(torch.equal(ours[name], value) for name, value in undisturbed.items())


@pytest.mark.parametrize(
    ("family", "settings"), [case for case in CASES if case[1].get("peft") not in ("bitfit", "full", "head")], ids=named
)
def test_plain_peft_loads_adapter_and_head_into_the_whole_classifier_and_scores_the_same(
    family: str, settings: dict[str, Any], made: Callable[..., Path], models: dict[str, Path], labelled: Path
) -> None:
    run = made(family, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message=".*Unsupported layer type")
        base = AutoModelForSequenceClassification.from_pretrained(models[family], num_labels=len(LABELS))
        model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer, rows = load_tokenizer(models[family]), [json.loads(line) for line in labelled.read_text().splitlines()]
    with torch.no_grad():
        logits_BC = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    due = torch.tensor([LABELS.index(row["label"]) for row in rows])
    after = RunReport.load(run).eval.after
    assert float(torch.nn.functional.cross_entropy(logits_BC, due)) == pytest.approx(after.loss, rel=1e-4)
    assert float((logits_BC.argmax(1) == due).float().mean()) == pytest.approx(after.accuracy)


def test_a_classifier_learns_what_its_rows_say(configured: Settings, tmp_path: Path) -> None:
    carry_out(configured("bert", steps=60, lr=2e-2), tmp_path / "run")
    report = RunReport.load(tmp_path / "run")
    assert report.eval.after.accuracy > 0.9
    assert report.eval.before.accuracy < 0.6
    found = evaluate(tmp_path / "run", RunDirectory(tmp_path / "run").config().data, Using(), QUIET)
    assert found.score.accuracy == report.eval.after.accuracy
    with pytest.raises(UsageError, match="a classifier continues no text"):
        continue_prompt(tmp_path / "run", "good", 4, Using(), QUIET)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_trains_above_the_span_alone_asks_for_each_row_once(
    family: str, configured: Settings, tmp_path: Path
) -> None:
    config = configured(family, cut="0:2", train="top", cache=tmp_path / "outputs", steps=18)
    fetched = prefetch(config, QUIET)
    assert fetched.present == 0
    carry_out(config, tmp_path / "run")
    assert RunReport.load(tmp_path / "run").cost.wire.up_bytes == 0
    carry_out(configured(family, here=True, cut="0:2", train="top", steps=18), tmp_path / "local")
    assert relative(values(tmp_path / "run"), values(tmp_path / "local")) < AFTER_ADAMW


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"peft": "prompt"}, "prompt trains no classifier's head; use lora, bitfit, full or head"),
        ({"method": "side"}, "side trains no classifier's head"),
        ({"sample": "a gem"}, "--sample continues a text, which a classifier does not"),
        ({"cut": "0:0"}, "train the classifier's head, --peft head"),
        ({"targets": ["lm_head"]}, "target 'lm_head' is no linear module"),
    ],
)
def test_what_trains_no_classifier_is_refused_by_name(
    settings: dict[str, Any], refusal: str, configured: Settings, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, ValidationError), match=refusal):
        carry_out(configured("bert", **settings), tmp_path / "run")


def test_an_encoder_is_not_trained_on_rows_without_labels(configured: Settings, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bert predicts no next token; give rows with labels"):
        carry_out(configured("bert", data=rows, eval_data=None), tmp_path / "run")


def test_a_label_that_training_never_saw_is_refused_with_those_that_it_did(
    configured: Settings, tmp_path: Path
) -> None:
    strange = tmp_path / "held-out.jsonl"
    strange.write_text('{"text": "so so", "label": "meh"}\n')
    with pytest.raises(DataError, match=r"held-out.jsonl:1: the label 'meh' is none of the run's: 'awful', 'fine'"):
        carry_out(configured("bert", eval_data=strange), tmp_path / "run")


def test_labels_are_predicted_with_their_probabilities_as_they_are_scored(
    made: Callable[..., Path], labelled: Path, tmp_path: Path
) -> None:
    run, texts = made("bert", {}), [json.loads(line) for line in labelled.read_text().splitlines()]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps({'text': row['text']})}\n" for row in texts))
    predict(run, tmp_path / "texts.jsonl", tmp_path / "answers.jsonl", Using(), QUIET)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = [answer["prediction"] == row["label"] for answer, row in zip(answers, texts, strict=True)]
    assert sum(right) / len(right) == RunReport.load(run).eval.after.accuracy
    assert all(sum(answer["probabilities"]) == pytest.approx(1) for answer in answers)
    nats = [
        -math.log(answer["probabilities"][LABELS.index(row["label"])])
        for answer, row in zip(answers, texts, strict=True)
    ]
    assert sum(nats) / len(nats) == pytest.approx(RunReport.load(run).eval.after.loss, rel=1e-4)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "so so"}\n')
    with pytest.raises(DataError, match=r"prompts.jsonl:1: has no .text., which is all that a classifier reads"):
        predict(run, tmp_path / "prompts.jsonl", tmp_path / "others.jsonl", Using(), QUIET)
