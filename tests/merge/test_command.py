"""What a model's owner is shown of merging, and what to run next."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from cloud_node.adapters_cli import merge_command
from isthmus.cut import Cut
from isthmus.errors import BundleError, UsageError
from isthmus.load import load_span, load_tokenizer
from tests.emulator.adapters import KEY, saved, submitted, weights, whole
from tests.harness import ENVIRONMENT
from tests.merge.adapters import made, named


def command(*arguments: str | Path) -> tuple[str, Exception | None]:
    app = typer.Typer()
    app.command("merge")(merge_command)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.stdout, done.exception  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dora", r"\d,\d{3} parameters changed in 4 weight matrices, by dora\n"),
        ("ln-tuning", r"160 parameters changed in 5 norms, by ln-tuning\n"),
        (
            "biases",
            r"parameters changed in (\d+ biases and 6 weight matrices|6 weight matrices and \d+ biases), by lora",
        ),
    ],
)
def test_what_changed_is_said_by_kind_and_method(
    name: str, said: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    family, out = ("gpt2" if name == "biases" else "llama"), tmp_path / "out"
    adapter = made(tiny_models[family], tmp_path / "adapter", named(name), family)
    told, error = command("--model", tiny_models[family], "--adapter", adapter, "--out", out)
    assert error is None, error
    assert re.search(said, told), told
    assert "nobody vouches" in told
    assert "which model it was trained on is not known" in told
    assert f"next: cloud_node serve --model {out} --certs certs/server" in told
    assert load_tokenizer(out)("good")["input_ids"]
    assert load_span(out, Cut(1, 1), torch.float32)


def test_json_says_the_same(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter = made(tiny_models["gpt2"], tmp_path / "adapter", named("head adapted"), "gpt2")
    told, error = command(
        "--model", tiny_models["gpt2"], "--adapter", adapter, "--out", tmp_path / "out", "--threads", "1", "--json"
    )
    assert error is None, error
    made_of = json.loads(told)
    assert made_of.pop("parameters") > 1000
    assert made_of == {
        "out": str(tmp_path / "out"),
        "method": "lora",
        "cut": None,
        "signed": False,
        "labels": None,
        "tensors": {"weight matrices": 7},
        "untied": True,
        "dtype": "float32",
    }


def test_a_submission_is_checked_against_the_key_that_is_given(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter, key = submitted(tiny_models["llama"], tmp_path / "edge" / "adapter"), tmp_path / "alice.pub"
    key.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    given = ["--model", tiny_models["llama"], "--signer", key]
    told, error = command(*given, "--adapter", tmp_path / "edge", "--out", tmp_path / "out")
    assert error is None, error
    assert "nobody" not in told
    assert "--cut 1:1" in told
    origin = json.loads((tmp_path / "out" / "plugged_in.json").read_text())
    assert origin["adapter"]
    assert origin["signer"]
    unsigned = made(tiny_models["llama"], tmp_path / "unsigned", named("lora"), "llama")
    _, error = command(*given, "--adapter", unsigned, "--out", tmp_path / "more")
    assert isinstance(error, BundleError)
    assert "is not signed" in str(error)
    (adapter / "manifest.sig").write_bytes(b"0" * 64)
    _, error = command(*given, "--adapter", adapter, "--out", tmp_path / "more")
    assert "signed by another key" in str(error)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("kind", ["bitfit", "full", "head"])
def test_weights_of_the_ends_own_go_in_as_they_are(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved(tiny_models["gpt2"], tmp_path / "adapter", "1:1", kind)
    told, error = command("--model", tiny_models["gpt2"], "--adapter", adapter, "--out", tmp_path / "out")
    assert error is None, error
    assert re.search(rf" parameters changed in \d+ (biases|tensors), by {kind}\n", told)
    assert ("no longer shares" in told) == (kind == "head")
    old, new = weights(whole(tiny_models["gpt2"])), weights(whole(tmp_path / "out"))
    changed = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert changed == {"lm_head.weight"} if kind == "head" else "lm_head.weight" not in changed


def test_a_pickle_is_refused_by_name(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"\x80")
    given = ["--model", tiny_models["llama"], "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"]
    _, error = command(*given)
    assert isinstance(error, BundleError)
    assert "adapter_model.bin is a pickle" in str(error)
    (tmp_path / "out").write_text("mine")
    assert isinstance(command(*given)[1], UsageError)


PROGRAM = """
import os, signal, shutil, sys
from tests.merge.test_command import command
shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
print(command("--model", sys.argv[1], "--adapter", sys.argv[2], "--out", sys.argv[3]))
"""


def test_a_process_that_is_killed_leaves_nothing_half_made(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    adapter, home = made(tiny_models["llama"], tmp_path / "adapter", named("lora"), "llama"), tmp_path / "new"
    given = [sys.executable, "-c", PROGRAM, tiny_models["llama"], adapter, home / "out"]
    done = subprocess.run(list(map(str, given)), env=ENVIRONMENT, cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (home / "out").exists()
    assert len(list(home.iterdir())) == 1, "what a killed process was writing is there, under another name"
    _, error = command("--model", tiny_models["llama"], "--adapter", adapter, "--out", home / "out")
    assert error is None, error
    assert [path.name for path in home.iterdir()] == ["out"]
