"""The whole way round over real processes and mutual TLS: build, ship, tune, submit, plug in, serve the result."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_command, serving, write_rows


@pytest.mark.timeout(240)
def test_what_an_owner_serves_in_the_end_is_what_the_edge_saw_plugged_in(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model, rows, cache = tiny_models["llama"], write_rows(tmp_path / "rows.jsonl"), tmp_path / "cache"
    (tmp_path / "public.txt").write_text("The river that the old bridge crosses is slow. " * 40)

    def run(*words: object) -> str:
        done = run_command(*map(str, words), cache=cache)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def scored(*words: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("edge_client", "evaluate", "--data", rows, "--json", *words))
        return found

    certs, run_dir = tmp_path / "certs", tmp_path / "run"
    server, alice, signers = certs / "server", certs / "alice", certs / "authority" / "issued"
    run("cloud_node", "certs", "init", "--dir", certs)
    run("cloud_node", "certs", "issue", "--name", "alice", "--dir", certs)
    build = ["cloud_node", "emulator", "build", "--model", model, "--cut", "1:1", "--certs", server]
    distill = ["--distill", tmp_path / "public.txt", "--steps", 6, "--max-length", 48]
    run(*build, "--method", "rank", "--keep", 0.5, *distill, "--out", tmp_path / "emulators" / "half")
    owner = ["--certs", server, "--emulators", tmp_path / "emulators", "--submissions", tmp_path / "in"]
    flags = map(str, ["--cut", "1:1", *owner, "--signers", signers])
    with serving(model, *flags, cache=cache) as node:
        at = ["--server", f"localhost:{node.address.rpartition(':')[2]}", "--certs", alice]
        ends = ["--lr", 0.01, "--steps", 6, "--data", rows, "--eval-data", rows]
        run("edge_client", "train", "--method", "offsite", *at, *ends, "--out", run_dir)
        plugged = scored("--run", run_dir, "--span", "remote")
        untouched = scored("--run", run_dir, "--span", "remote", "--untouched")
        receipt = json.loads(run("edge_client", "submit", "--run", run_dir, *at, "--json"))
        again = json.loads(run("edge_client", "submit", "--run", run_dir, *at, "--json"))
    assert plugged["loss"] != pytest.approx(untouched["loss"], rel=1e-3)
    assert (receipt["already"], again) == (False, {**receipt, "already": True})
    (submitted,) = (tmp_path / "in").glob(f"*/{receipt['bundle']}")

    plug_in = ["cloud_node", "plug-in", "--model", model, "--adapter", submitted, "--signer", signers / "alice.pub"]
    said = json.loads(run(*plug_in, "--out", tmp_path / "plugged", "--eval-data", rows, "--json"))
    assert said["scores"]["untouched"]["loss"] == pytest.approx(untouched["loss"], rel=1e-6)
    assert said["scores"]["plugged_in"]["loss"] == pytest.approx(plugged["loss"], rel=1e-5)
    with serving(tmp_path / "plugged", "--cut", "1:1", "--certs", str(server), cache=cache) as node:
        at = ["--server", f"localhost:{node.address.rpartition(':')[2]}", "--certs", alice]
        run("edge_client", "train", "--method", "split", *at, *ends, "--steps", 1, "--out", tmp_path / "next")
    begun = json.loads((tmp_path / "next" / "run.json").read_text())
    assert begun["eval"]["before"]["loss"] == pytest.approx(plugged["loss"], rel=1e-5)
    assert list((tmp_path / "in").iterdir()) == [submitted.parent]
