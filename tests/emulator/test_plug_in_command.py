"""What the owner is shown of plugging in: what it gained, what is protected, and what to run next."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from cloud_node.adapters_cli import plug_in_command
from cloud_node.comparing import Comparison, OnEmulator
from emulator.plug_in import tuned_on
from isthmus.cut import Cut
from isthmus.emulated.load import load_emulated
from isthmus.emulated.recipe import Emulator, Recipe
from isthmus.errors import BundleError, CertificateError, UsageError
from isthmus.report.evaluated import PerRow
from isthmus.report.fields.score import Score
from isthmus.report.gains import in_words
from isthmus.report.offsite import Row
from isthmus.training.scoring import Scores
from tests.emulator.adapters import EXACT, KEY, apart, plugged, saved, submitted, weights, whole
from tests.emulator.conftest import Make, logits
from tests.offsite.by_hand import flip
from tests.report.offsite_example import alone, table


def scores(nats: list[float], correct: list[bool]) -> Scores:
    return Scores(tuple(nats), (1,) * len(nats), tuple(correct), len(nats), len(nats))


ABOUT = Emulator(
    recipe=Recipe(method="drop", cut="1:1", blocks=(1, None, None, 4)),
    parameters=1,
    span_parameters=2,
    weight_bytes=4,
    flops_per_token=2,
    span_flops_per_token=4,
)
LOW = [1.0 + 0.01 * row for row in range(40)], [row % 2 == 0 for row in range(40)]
HIGH = [0.5 + 0.01 * row for row in range(40)], [row % 8 != 0 for row in range(40)]


@pytest.mark.parametrize("choices", [True, False], ids=["accuracy", "loss"])
def test_gain_and_protection_are_claimed_only_where_the_interval_leaves_no_doubt(choices: bool) -> None:
    low, high = (scores(nats, correct if choices else []) for nats, correct in (LOW, HIGH))

    def said(untouched: Scores, plugged_in: Scores, tuned: Scores) -> list[str]:
        found = Comparison(untouched, plugged_in, OnEmulator(ABOUT, 8, low, tuned))
        told = found.as_dict()
        assert [told["words"], told["protection"]["words"]] == found.in_words()
        return [*found.in_words(), told["verdict"], told["protection"]["verdict"]]

    by = "accuracy +37.5 points [" if choices else "loss -0.5000 ["
    gain, protection, *verdicts = said(low, high, low)
    assert gain.startswith(f"Plugging in gained over the untouched model: {by}")
    assert protection.startswith("The plugged-in model is better than the tuned emulator alone, which is the owner's")
    assert by in protection
    assert verdicts == ["better", "better"]
    gain, protection, *verdicts = said(high, low, high)
    assert gain.startswith("Plugging in made things worse than the untouched model: ")
    assert protection.startswith("No protection for the owner: the tuned emulator alone is better")
    assert verdicts == ["worse", "worse"]
    gain, protection, *verdicts = said(low, low, low)
    assert gain.startswith("40 rows do not tell whether plugging in gained")
    assert protection.startswith(
        "40 rows do not tell the plugged-in model from the tuned emulator alone: no protection"
    )
    assert verdicts == ["undecided", "undecided"]
    assert len(Comparison(low, high).in_words()) == 1


@pytest.mark.parametrize(
    ("after", "verdict", "begin"),
    [
        ((HIGH[0], LOW[1]), "better", "Plugging in gained"),
        (([nats + 1.43 for nats in LOW[0]], LOW[1]), "worse", "Plugging in made things worse"),
        (([nats + 1.43 for nats in LOW[0]], HIGH[1]), "mixed", "Plugging in made accuracy better and loss worse"),
    ],
    ids=["better loss", "worse loss", "mixed"],
)
def test_the_owner_is_told_what_the_edges_report_says_of_the_same_scores(
    after: tuple[list[float], list[bool]], verdict: str, begin: str
) -> None:
    def row(label: str, found: Scores) -> Row:
        figures = PerRow(nats=found.nats, tokens=found.tokens, correct=found.correct)
        return Row(label, Score.of(found.loss, found.correct), figures)

    before, plugged_in = scores(*LOW), scores(*after)
    compared = Comparison(before, plugged_in, OnEmulator(ABOUT, 8, before, before))
    made = replace(
        table(alone()),
        untouched=row("untouched model", before),
        tuned=row("tuned on the emulator", before),
        plugged_in=row("plugged in", plugged_in),
    )
    assert tuple(compared.in_words()) == in_words(made)
    assert compared.in_words()[0].startswith(begin)
    assert compared.as_dict()["verdict"] == verdict


def command(*arguments: str | Path) -> tuple[str, Exception | None]:
    app = typer.Typer()
    app.command("plug-in")(plug_in_command)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.stdout, done.exception  # type: ignore[return-value]


def test_the_command_plugs_in_scores_both_models_and_says_what_to_run_next(
    tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    adapter, out, key = submitted(tiny_models["llama"], tmp_path / "adapter"), tmp_path / "out", tmp_path / "alice.pub"
    key.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    given = ["--model", tiny_models["llama"], "--adapter", adapter, "--signer", key, "--threads", "1"]
    said, error = command(*given, "--out", out, "--eval-data", rows)
    assert error is None, error
    assert f"next: cloud_node serve --model {out} --cut 1:1" in said
    assert "untouched       accuracy" in said
    assert "only the edge can tell what N true steps" in said
    assert re.search(r"out: \d,\d{3} parameters changed in 4 weight matrices, by lora\n", said)
    said_before = said
    said, error = command(*given, "--out", tmp_path / "again", "--eval-data", rows, "--device", "cpu", "--json")
    made = json.loads(said)
    assert (made["kind"], made["cut"], made["signed"], made["dtype"]) == ("lora", "1:1", True, "float32")
    assert made["scores"]["rows"] == 24
    assert made["scores"]["words"] in said_before
    assert made["scores"]["plugged_in"]["loss"] != made["scores"]["untouched"]["loss"]
    again, first = weights(whole(tmp_path / "again")), weights(whole(out))
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_a_key_that_is_not_there_or_no_key_is_asked_for_by_the_flag_that_names_it(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter, other = submitted(tiny_models["llama"], tmp_path / "adapter"), tmp_path / "other.pub"
    other.write_text("no key")
    given = ["--model", tiny_models["llama"], "--adapter", adapter, "--out", tmp_path / "out"]
    for key, wrong in ((tmp_path / "nosuch.pub", "is no file"), (other, "holds no public key that signs")):
        _, error = command(*given, "--signer", key)
        assert isinstance(error, CertificateError)
        assert str(error) == (
            f"{key} {wrong}: name the key of the edge that submitted, --signer certs/authority/issued/NAME.pub"
        )
    assert not (tmp_path / "out").exists()


def test_a_submission_that_was_damaged_since_is_to_be_submitted_again(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = submitted(tiny_models["llama"], tmp_path / "adapter")
    flip(adapter / "adapter_model.safetensors")
    _, error = command("--model", tiny_models["llama"], "--adapter", adapter, "--out", tmp_path / "out")
    assert isinstance(error, BundleError)
    assert str(error).endswith("adapter_model.safetensors is not what its hash says: have it submitted again")


@pytest.mark.parametrize(("kind", "what"), [("bitfit", "biases"), ("full", "tensors")])
def test_what_was_changed_is_called_what_it_is(
    kind: str, what: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = saved(tiny_models["gpt2"], tmp_path / "adapter", "1:1", kind)
    said, _ = command("--model", tiny_models["gpt2"], "--adapter", adapter, "--out", tmp_path / "out")
    assert re.search(rf" parameters changed in \d+ {what}, by {kind}\n", said)


def test_the_command_says_when_nobody_vouches_for_the_adapter_and_refuses_before_it_writes(
    tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    adapter = saved(tiny_models["gpt2"], tmp_path / "adapter", "1:1", targets=["lm_head"])
    given = ["--model", tiny_models["gpt2"], "--adapter", adapter, "--out", tmp_path / "out"]
    said, error = command(*given)
    assert error is None, error
    assert "nobody vouches" in said
    assert "which model it was tuned on is not known" in said
    assert "no longer shares the embedding's matrix" in said
    _, error = command(*given)
    assert isinstance(error, UsageError)
    _, error = command(*given[:4], "--out", tmp_path / "more", "--eval-data", tmp_path / "absent.jsonl")
    assert "absent.jsonl" in str(error)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_emulator_shows_what_the_edge_has_by_itself_and_what_is_protected(
    tiny_models: dict[str, Path], rows: Path, make: Make, tmp_path: Path, kind: str
) -> None:
    home, emulator = tiny_models["llama"], tmp_path / "emulator"
    adapter = saved(home, tmp_path / "adapter", "1:1", kind, ["q_proj", "lm_head"] if kind == "lora" else None)
    make(emulator, method="quant", bits=4)
    given = ["--model", home, "--adapter", adapter, "--eval-data", rows, "--emulator", emulator]
    said, error = command(*given, "--out", tmp_path / "out")
    assert error is None, error
    lines = {line[:16].strip(): line for line in said.splitlines()}
    assert {"untouched", "emulator", "tuned emulator", "plugged in", "bytes", "FLOPs/token"} <= lines.keys()
    assert "of the span's" in lines["bytes"]
    assert re.search(r"the tuned emulator alone.*: accuracy [+-]\d+\.\d points \[", said)
    told = json.loads(command(*given, "--out", tmp_path / "again", "--json")[0])["scores"]
    assert told["protection"]["words"] in said
    assert told["protection"]["loss_rise"][0] == pytest.approx(
        told["plugged_in"]["loss"] - told["tuned_emulator"]["loss"]
    )
    assert (
        len({round(told[name]["loss"], 6) for name in ("untouched", "emulator", "tuned_emulator", "plugged_in")}) == 4
    )
    assert told["weight_bytes"] < told["span_bytes"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_on_an_emulator_that_is_the_span_tuned_ends_do_what_they_do_plugged_in(
    tiny_models: dict[str, Path], rows: Path, make: Make, tmp_path: Path, kind: str
) -> None:
    home, emulator = tiny_models["gpt2"], tmp_path / "emulator"
    adapter = saved(home, tmp_path / "adapter", "1:1", kind, ["c_attn", "lm_head"] if kind == "lora" else None)
    make(emulator, "gpt2", method="drop", keep=4)
    tuned, _, model = plugged(home, adapter, tmp_path / "out")
    ours = tuned_on(load_emulated(emulator, torch.float32).model, tuned)
    assert apart(logits(ours), logits(model)) < EXACT
    given = ["--model", home, "--adapter", adapter, "--eval-data", rows, "--emulator", emulator, "--json"]
    told = json.loads(command(*given, "--out", tmp_path / "again")[0])["scores"]
    assert told["tuned_emulator"]["loss"] == pytest.approx(told["plugged_in"]["loss"], rel=1e-5)
    assert "no protection for the owner shows" in told["protection"]["words"]


def test_an_emulator_of_another_model_or_cut_is_refused_before_anything_is_written(
    tiny_models: dict[str, Path], rows: Path, make: Make, tmp_path: Path
) -> None:
    adapter = submitted(tiny_models["llama"], tmp_path / "adapter")
    given = ["--model", tiny_models["llama"], "--out", tmp_path / "out", "--eval-data", rows]
    others = {"is an emulator of the model": tmp_path / "model", "of cut 2:0, and the adapter of 1:1": tmp_path / "cut"}
    make(tmp_path / "model", "gpt2", method="drop", keep=2)
    make(tmp_path / "cut", method="drop", keep=2, cut=Cut(2, 0))
    for why, emulator in others.items():
        _, error = command(*given, "--adapter", adapter, "--emulator", emulator)
        assert isinstance(error, BundleError)
        assert why in str(error)
    _, error = command(
        *given, "--adapter", saved(tiny_models["llama"], tmp_path / "own", "1:1"), "--emulator", others.popitem()[1]
    )
    assert "where the emulator stands" in str(error)
    _, error = command(*given[:4], "--adapter", adapter, "--emulator", tmp_path)
    assert "give --eval-data" in str(error)
    assert not (tmp_path / "out").exists()


def test_an_emulator_that_the_adapter_was_not_tuned_on_is_not_scored_as_if_it_were(
    tiny_models: dict[str, Path], rows: Path, make: Make, tmp_path: Path
) -> None:
    right, wrong = (make(tmp_path / name, method="drop", keep=keep) for name, keep in (("right", 2), ("wrong", 3)))
    adapter = submitted(tiny_models["llama"], tmp_path / "adapter", emulator=right.manifest.id)
    given = ["--model", tiny_models["llama"], "--adapter", adapter, "--eval-data", rows]
    _, error = command(*given, "--out", tmp_path / "out", "--emulator", tmp_path / "wrong")
    assert isinstance(error, BundleError)
    assert f"was tuned on emulator {right.manifest.id[:16]}" in str(error)
    assert wrong.manifest.id[:16] in str(error)
    assert not (tmp_path / "out").exists()
    said, error = command(*given, "--out", tmp_path / "out", "--emulator", tmp_path / "right")
    assert error is None
    assert "tuned emulator" in said


def test_the_folder_of_an_edge_will_do_while_it_holds_one_submission(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "submitted" / "alice-0a1b"
    submitted(tiny_models["llama"], home / "first")
    given = ["--model", tiny_models["llama"], "--adapter", home]
    said, error = command(*given, "--out", tmp_path / "out")
    assert error is None, error
    assert "--cut 1:1" in said
    submitted(tiny_models["llama"], home / "second")
    _, error = command(*given, "--out", tmp_path / "again")
    assert isinstance(error, UsageError)
    assert str(error).endswith("alice-0a1b holds 2 submissions; name the folder of one with --adapter: first, second")
