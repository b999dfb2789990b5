"""A sealed run trains to the same bits as a plain one, and every command uses it, given what opens it."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client import sealing_cli, secrets_given
from edge_client.runs import RunDirectory
from edge_client.secrets_given import NEW_VARIABLE, VARIABLE
from edge_client.submitting import pack, packed_from
from edge_client.train import _Trainer
from isthmus.bundle import read
from isthmus.report.schema import RunReport
from isthmus.trust.sealing import ENDING
from tests.cache.training import kept
from tests.faults.training import as_flags, is_one_line, run_here, settings
from tests.harness import ENVIRONMENT, Server, run_command
from tests.sealing.conftest import PASSPHRASE, STEPS, Edge

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unsealed(edge: Edge, run: Path, *flags: str | Path) -> dict[str, bytes]:
    out = run.parent / f"unsealed-{run.name}"
    shutil.rmtree(out, ignore_errors=True)
    code, _, said = edge("unseal", "--run", run, "--out", out, *flags)
    assert code == 0, said
    assert out.stat().st_mode & 0o777 == 0o700
    return contents(out)


def refused(answer: tuple[int, str, str], *words: str) -> None:
    code, _, said = answer
    assert code in (2, 12, 13), said
    assert is_one_line(said), said
    assert all(word in said for word in words), said


def test_its_adapter_unsealed_is_that_of_the_plain_run_byte_for_byte(edge: Edge, sealed: Path, plain: Path) -> None:
    assert {path.name for path in (sealed / "adapter").iterdir()} == {f"{name}{ENDING}" for name in NAMES}
    assert {path.suffix for path in (sealed / "checkpoints").iterdir()} == {ENDING}
    assert unsealed(edge, sealed) == contents(plain / "adapter")
    assert RunReport.load(sealed).adapter == RunReport.load(plain).adapter
    assert RunReport.load(sealed).eval == RunReport.load(plain).eval
    refused(edge("unseal", "--run", sealed, "--out", sealed), "there already")
    refused(edge("unseal", "--run", plain, "--out", sealed.parent / "none"), "not sealed")


def test_a_run_that_is_cut_short_goes_on_to_the_same_bits_and_after_a_torn_checkpoint_too(
    edge: Edge, local: list[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "run", _Trainer._step

    def die(trainer: _Trainer) -> None:
        if trainer._at.step == 3:
            raise KeyboardInterrupt
        step(trainer)

    with monkeypatch.context() as dying:
        dying.setattr(_Trainer, "_step", die)
        assert edge("train", *local, "--seal", "--out", out)[0] == 130
    newest = max((out / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-5])
    code, _, said = edge("train", "--resume", "--out", out)
    assert code == 0, said
    assert RunReport.load(out).steps == STEPS
    assert unsealed(edge, out) == contents(plain / "adapter")


def test_evaluate_generate_chat_and_predict_answer_as_for_the_plain_run(
    edge: Edge, sealed: Path, plain: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, list[str]] = {}
    for run in (sealed, plain):
        scores = json.loads(edge("evaluate", "--run", run, "--data", rows, "--json")[1])
        text = json.loads(edge("generate", "--run", run, "--prompt", "good", "--max-new-tokens", "4", "--json")[1])
        answers = tmp_path / f"{run.parent.name}.jsonl"
        assert edge("predict", "--run", run, "--data", rows, "--out", answers, "--max-new-tokens", "4")[0] == 0
        monkeypatch.setattr(sys, "stdin", io.StringIO("good\n"))
        code, talk, _ = edge("chat", "--run", run, "--max-new-tokens", "4")
        assert code == 0
        said[run.parent.name] = [scores["loss"], scores["adapter"], text["text"], talk]
    one, other = said.values()
    assert one == other
    written, due = (tmp_path / f"{run.parent.name}.jsonl" for run in (sealed, plain))
    assert due.read_bytes()[:20] not in written.read_bytes()
    assert edge("unseal", "--run", sealed, "--answers", written, "--out", tmp_path / "opened")[0] == 0
    assert (tmp_path / "opened").read_bytes() == due.read_bytes()


def test_sealed_answers_go_on_after_a_torn_line_and_a_changed_or_moved_one_is_refused(
    edge: Edge, sealed: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    predict: list[str | Path] = ["predict", "--run", sealed, "--data", rows, "--out", out]
    unseal: list[str | Path] = ["unseal", "--run", sealed, "--answers", out, "--out"]
    assert edge(*predict)[0] == 0
    assert edge(*unseal, tmp_path / "whole")[0] == 0
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(rows.read_bytes().splitlines()) > 3
    out.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    code, said, _ = edge(*predict, "--resume")
    assert (code, "after 2 that were there" in said) == (0, True)
    assert edge(*unseal, tmp_path / "again")[0] == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    flipped = bytearray(lines[0])
    flipped[-6] = ord("A") if flipped[-6] != ord("A") else ord("B")
    for wrong in (bytes(flipped) + lines[1], lines[1] + lines[0], b"{}\n"):
        out.write_bytes(wrong)
        refused(edge(*unseal, tmp_path / "none"), str(out))
        refused(edge(*predict, "--resume"), str(out))
    assert not (tmp_path / "none").exists()


def test_an_adapter_that_is_still_sealed_is_refused_by_name_where_it_is_merged(
    sealed: Path, tiny_models: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    merge: list[str | Path] = ["cloud_node", "merge", "--model", tiny_models["llama"], "--adapter", sealed / "adapter"]
    done = run_command(*merge, "--out", tmp_path / "merged", cache=cache)
    assert done.returncode == 12
    assert is_one_line(done.stderr)
    assert "edge_client unseal" in done.stderr


def test_another_run_begins_from_it(edge: Edge, sealed: Path, plain: Path, local: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in local if flag not in ("--cut", "1:1")]
    for run in (sealed, plain):
        code, _, said = edge("train", *flags, "--from", run, "--out", tmp_path / f"after-{run.parent.name}")
        assert code == 0, said
    (one, other) = tmp_path.glob("after-*")
    assert contents(one / "adapter") == contents(other / "adapter")


def test_without_the_passphrase_or_with_a_wrong_one_everything_is_refused_in_one_line(
    edge: Edge, sealed: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str | Path]] = [
        ["train", "--resume", "--out", sealed],
        ["evaluate", "--run", sealed, "--data", rows],
        ["generate", "--run", sealed, "--prompt", "x"],
        ["chat", "--run", sealed],
        ["predict", "--run", sealed, "--data", rows, "--out", tmp_path / "answers"],
        ["submit", "--run", sealed, "--server", "127.0.0.1:1"],
        ["unseal", "--run", sealed, "--out", tmp_path / "out"],
        ["reseal", "--run", sealed],
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for command in commands:
        monkeypatch.setenv(VARIABLE, "wrong")
        refused(edge(*command), "this passphrase does not open", "seal.json")
        monkeypatch.delenv(VARIABLE)
        refused(edge(*command), VARIABLE, "--key-file")
    assert edge("report", sealed)[0] == 0  # which needs nothing that is sealed
    assert not (tmp_path / "out").exists()


def test_a_tampered_adapter_is_refused(edge: Edge, sealed: Path, tmp_path: Path) -> None:
    path = sealed / "adapter" / f"adapter_model.safetensors{ENDING}"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes((content[-1] ^ 1,)))
    for command in (
        ["unseal", "--run", sealed, "--out", tmp_path / "out"],
        ["generate", "--run", sealed, "--prompt", "x"],
    ):
        code, _, said = edge(*command)
        assert code == 12
        assert is_one_line(said)
        assert "changed after it was sealed" in said
    shutil.copy(sealed / "adapter" / f"adapter_config.json{ENDING}", path)
    refused(edge("unseal", "--run", sealed, "--out", tmp_path / "out"), "another file under this name")


def test_a_passphrase_is_asked_for_on_a_terminal_once_or_twice_where_it_is_new(
    edge: Edge, local: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: (asked.append(prompt), PASSPHRASE)[1])
    assert edge("train", *local, "--seal", "--out", tmp_path / "run")[0] == 0
    assert [prompt.endswith("again: ") for prompt in asked] == [False, True]
    monkeypatch.setattr(secrets_given, "_typed", {})
    assert unsealed(edge, tmp_path / "run").keys() == set(NAMES)
    assert len(asked) == 3
    monkeypatch.setattr(secrets_given, "_typed", {})
    monkeypatch.setattr("getpass.getpass", lambda prompt: prompt)
    refused(edge("train", *local, "--seal", "--out", tmp_path / "other"), "differ")
    assert not (tmp_path / "other" / "seal.json").exists()


def test_a_key_file_seals_and_opens_and_is_remembered_by_its_path(
    edge: Edge, local: list[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    key, out = tmp_path / "seal.key", tmp_path / "run"
    assert edge("seal-key", "--out", key)[0] == 0
    code, _, said = edge("train", *local, "--seal", "--key-file", key, "--out", out)
    assert code == 0, said
    assert unsealed(edge, out) == contents(plain / "adapter")
    key.rename(tmp_path / "elsewhere")
    refused(edge("generate", "--run", out, "--prompt", "x"), "cannot be read")
    assert unsealed(edge, out, "--key-file", tmp_path / "elsewhere") == contents(plain / "adapter")


def test_after_reseal_the_new_one_opens_it_the_old_one_does_not_and_nothing_else_changed(
    edge: Edge, sealed: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path: path.read_bytes() for path in sealed.rglob(f"*{ENDING}")}
    monkeypatch.setenv(NEW_VARIABLE, "second")
    assert edge("reseal", "--run", sealed)[0] == 0
    assert {path: path.read_bytes() for path in sealed.rglob(f"*{ENDING}")} == files
    refused(edge("unseal", "--run", sealed, "--out", tmp_path / "out"), "does not open")
    monkeypatch.setenv(VARIABLE, "second")
    assert unsealed(edge, sealed) == contents(plain / "adapter")
    assert edge("seal-key", "--out", tmp_path / "seal.key")[0] == 0
    assert edge("reseal", "--run", sealed, "--new-key-file", tmp_path / "seal.key")[0] == 0
    monkeypatch.delenv(VARIABLE)
    assert unsealed(edge, sealed) == contents(plain / "adapter")  # config.yaml names the key file
    assert edge("train", "--resume", "--out", sealed)[0] == 0


def test_a_reseal_that_is_killed_at_any_point_leaves_a_run_that_the_old_one_or_the_new_one_opens(
    edge: Edge, sealed: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NEW_VARIABLE, "second")
    calls, outcomes = 0, set()
    for name in ("fsync", "replace"):
        for last in range(1, 5):
            calls, real = 0, getattr(os, name)

            def die(*given: object, real: object = real, last: int = last) -> None:
                nonlocal calls
                calls += 1
                if calls == last:
                    raise KeyboardInterrupt
                real(*given)  # type: ignore[operator]

            with monkeypatch.context() as dying:
                dying.setattr(os, name, die)
                edge("reseal", "--run", sealed)
            opened = []
            for secret in (PASSPHRASE, "second"):
                monkeypatch.setenv(VARIABLE, secret)
                out = tmp_path / f"{name}-{last}-{len(secret)}"
                if edge("unseal", "--run", sealed, "--out", out)[0] == 0:
                    opened.append(secret)
                    assert contents(out) == contents(plain / "adapter")
            assert len(opened) == 1
            outcomes.update(opened)
            if opened == ["second"]:
                monkeypatch.setenv(NEW_VARIABLE, PASSPHRASE)
                assert edge("reseal", "--run", sealed)[0] == 0
                monkeypatch.setenv(NEW_VARIABLE, "second")
            monkeypatch.setenv(VARIABLE, PASSPHRASE)
    assert outcomes == {PASSPHRASE, "second"}


def test_a_wipe_destroys_the_key_first_and_leaves_what_is_no_part_of_the_run(
    edge: Edge, sealed: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sealed / "notes.txt").write_text("mine")
    monkeypatch.delenv(VARIABLE)
    with monkeypatch.context() as dying:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        dying.setattr(shutil, "rmtree", die)
        assert edge("wipe", "--run", sealed)[0] == 130
    assert not (sealed / "seal.json").exists()
    assert (sealed / "adapter").exists()
    refused(edge("unseal", "--run", sealed, "--out", sealed.parent / "out"), "is gone, and with it the key")
    refused(edge("train", "--resume", "--out", sealed), "is gone, and with it the key")
    code, out, said = edge("wipe", "--run", sealed)
    assert code == 0, said
    assert [path.name for path in sealed.iterdir()] == ["notes.txt"]
    assert "notes.txt" in out
    assert sealing_cli.WHAT_STAYS in out
    refused(edge("wipe", "--run", plain), "not sealed")
    assert (plain / "adapter").exists()


def test_what_would_stand_in_plaintext_or_makes_no_sense_is_refused(
    edge: Edge, local: list[str], plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    refused(edge("train", *local, "--seal", "--sample", "text", "--out", out), "--sample")
    refused(edge("train", *local, "--key-file", tmp_path / "key", "--out", out), "--seal")
    refused(edge("train", "--resume", "--seal", "--out", plain), "--seal cannot change")
    assert not (out / "config.yaml").exists()


def test_a_sealed_adapter_is_packed_for_the_owner_as_the_plain_one_is(
    sealed: Path, plain: Path, tmp_path: Path
) -> None:
    key, directory = Ed25519PrivateKey.generate(), RunDirectory(sealed)
    directory.unlock(None)
    (tmp_path / "packed").mkdir()
    (tmp_path / "empty").mkdir()
    due, found = pack(plain, tmp_path / "packed", key), packed_from(directory, tmp_path / "empty", key)
    assert found.manifest == due
    assert list(found.read()) == list(read(tmp_path / "packed", due, 0))
    assert not list((tmp_path / "empty").iterdir())


def test_a_killed_sealed_run_is_reported_with_what_its_checkpoint_says_where_that_can_be_opened(
    edge: Edge, sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sealed / "run.json").unlink()
    known = edge("report", sealed, "--format", "json")
    monkeypatch.setenv(VARIABLE, "wrong")
    unknown = edge("report", sealed, "--format", "json")
    assert (known[0], unknown[0]) == (0, 0), known[2] + unknown[2]
    assert "model_digest" in known[1]
    assert known[1] != unknown[1]


def test_weights_in_the_format_of_isthmus_are_sealed_and_used_as_well(
    edge: Edge, tiny_models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    changes = {"method": "local", "model": str(tiny_models["llama"]), "peft": "bitfit", "steps": 1}
    changes |= {"peft": "full", "train": "top", "cut": "0:1"}
    config = settings(None, rows, **changes)
    run_here(config, tmp_path / "plain")
    code, _, said = edge("train", *as_flags(config), "--seal", "--out", tmp_path / "run")
    assert code == 0, said
    plain, found = contents(tmp_path / "plain" / "adapter"), unsealed(edge, tmp_path / "run")
    assert found.keys() == plain.keys()
    assert {name for name in found if found[name] != plain[name]} == {"manifest.sig"}  # by a key of the run's own
    text = [edge("generate", "--run", tmp_path / run, "--prompt", "good")[1] for run in ("plain", "run")]
    assert text[0] == text[1]


@pytest.mark.parametrize("method", ["top", "side"])
def test_outputs_are_kept_sealed_filled_ahead_and_read_by_any_run_of_the_same_passphrase(
    edge: Edge,
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = kept(servers["llama"], rows, tmp_path / "cache", method, steps=2)
    run_here(config, tmp_path / "plain")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "config.yaml").write_text((tmp_path / "plain" / "config.yaml").read_text())
    code, out, said = edge("prefetch", "--config", tmp_path / "config.yaml", "--seal", "--json")
    assert code == 0, said
    assert json.loads(out)["present"] == 0
    assert edge("train", "--config", tmp_path / "config.yaml", "--seal", "--out", tmp_path / "run")[0] == 0
    use = RunReport.load(tmp_path / "run").cost.wire.cache
    assert use is not None
    assert use.train.fetched_rows + use.eval.fetched_rows == 0
    entries = list((tmp_path / "cache").rglob("*.safetensors*"))
    assert entries
    assert {path.suffix for path in entries} == {ENDING}
    weights = {path.name: path.read_bytes() for path in (tmp_path / "plain" / "adapter").glob("*.safetensors")}
    assert unsealed(edge, tmp_path / "run").items() >= weights.items()

    monkeypatch.setenv(NEW_VARIABLE, "second")
    assert edge("reseal", "--run", tmp_path / "run")[0] == 0
    assert json.loads(edge("prefetch", "--config", tmp_path / "config.yaml", "--seal", "--json")[1])["present"] == 0
    monkeypatch.setenv(VARIABLE, "second")
    again = json.loads(edge("prefetch", "--config", tmp_path / "config.yaml", "--seal", "--json")[1])
    assert again["fetched"] == 0
    assert edge("evaluate", "--run", tmp_path / "run", "--data", rows)[0] == 0
    assert edge("wipe", "--run", tmp_path / "run", "--with-cache")[0] == 0
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not (tmp_path / "run").exists()


def test_a_process_of_its_own_takes_the_passphrase_from_its_environment(
    sealed: Path, plain: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, VARIABLE, PASSPHRASE)
    done = run_command("edge_client", "unseal", "--run", sealed, "--out", tmp_path / "out", cache=cache)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(plain / "adapter")
    monkeypatch.setitem(ENVIRONMENT, VARIABLE, "wrong")
    done = run_command("edge_client", "unseal", "--run", sealed, "--out", tmp_path / "other", cache=cache)
    assert done.returncode == 13
    assert is_one_line(done.stderr)
