"""Whole runs by the command line: the second epoch is free, resuming changes no bit, and what was learnt is usable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from edge_client import train as training
from edge_client.adapter_folder import load_adapter
from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from isthmus.report.schema import RunReport
from isthmus.training.batches import batch_at
from tests.faults.training import run_here, same_bits
from tests.forward_only.edges import SIDE, Finished, carry_out, command, run_settings
from tests.harness import Server, byte_tokenizer
from tests.parity.reference import connected, relative, whole_model

WAYS = ("top", "side")
STEPS_AN_EPOCH, NEW_TOKENS = 3, 8
PROMPT = "good slow:"
TENSORS = ("up_payload_bytes", "down_payload_bytes")

Finish = Callable[[str], Finished]


def learnt(out: Path) -> dict[str, torch.Tensor]:
    """What a run has saved."""
    (path,) = (out / "adapter").glob("adapter*.safetensors")
    values: dict[str, torch.Tensor] = load_file(path)
    return values


def ledger_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", WAYS)
def test_after_the_first_epoch_no_tensor_crosses_in_training_nor_in_the_evaluation_after_it(
    finished: Finish, way: str
) -> None:
    lines = ledger_lines(finished(way).out)
    trained = [line for line in lines if line["phase"] == "train"]
    assert sorted({line["step"] for line in trained}) == list(range(1, 3 * STEPS_AN_EPOCH + 1))
    for figure in TENSORS:
        assert all(line.get(figure, 0) > 0 for line in trained if line["step"] <= STEPS_AN_EPOCH), figure
        assert all(line.get(figure, 0) == 0 for line in trained if line["step"] > STEPS_AN_EPOCH), figure
        scored = {line["step"]: line.get(figure, 0) for line in lines if line["phase"] == "eval"}
        assert scored[0] > 0, figure
        assert scored[3 * STEPS_AN_EPOCH] == 0, figure
    assert all(line.get("cloud_backward_flops", 0) == 0 for line in lines)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_died_after_a_checkpoint_resumes_without_its_cache_to_the_bits_of_one_undisturbed(
    nodes: dict[str, Server], rows: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    given: dict[str, Any] = {"epochs": 2, "eval_data": held_out, "deterministic": True, "checkpoint_every": 2}
    address = nodes["llama"].address
    undisturbed = carry_out(way, address, rows, tmp_path / "undisturbed", **given)

    def dies(lengths: tuple[int, ...], size: int, seed: int, step: int) -> list[int]:
        if step == 5:
            raise MemoryError("in the sixth step")
        return batch_at(lengths, size, seed, step)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_at", dies)
        with pytest.raises(MemoryError):
            run_here(run_settings(way, address, rows, tmp_path / "kept", **given), out)
    resumed = command("train", "--resume", "--out", out, "--cache", tmp_path / "another")
    assert resumed.code == 0, resumed.err
    report = RunReport.load(out)
    assert (report.status, report.steps) == ("complete", 2 * STEPS_AN_EPOCH)
    assert same_bits(learnt(out), learnt(undisturbed.out))
    assert (out / "scores.json").read_bytes() == (undisturbed.out / "scores.json").read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_scored_the_same_over_the_wire_and_with_the_whole_model_here(
    finished: Finish, tiny_models: dict[str, Path], held_out: Path, way: str
) -> None:
    run = finished(way).out
    asked = ("evaluate", "--run", run, "--data", held_out, "--json")
    remote = command(*asked)
    local = command(*asked, "--span", "local", "--model", tiny_models["llama"])
    assert (remote.code, local.code) == (0, 0), remote.err + local.err
    ours, theirs = json.loads(remote.out), json.loads(local.out)
    after = RunReport.load(run).eval.after
    assert after is not None
    assert ours["accuracy"] == theirs["accuracy"] == after.accuracy
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ours["loss"] == pytest.approx(after.loss, abs=1e-4)
    assert ours["up_bytes"] == 0, "its outputs were all kept by the run"


@pytest.mark.parametrize("way", WAYS)
def test_generated_text_is_the_whole_models_and_a_side_network_says_what_each_token_costs(
    finished: Finish, tiny_models: dict[str, Path], way: str
) -> None:
    asked = ("generate", "--run", finished(way).out, "--prompt", PROMPT, "--max-new-tokens", NEW_TOKENS, "--json")
    remote = command(*asked)
    local = command(*asked, "--span", "local", "--model", tiny_models["llama"])
    assert (remote.code, local.code) == (0, 0), remote.err + local.err
    for done in (remote, local):
        assert ("each token runs the whole text again" in " ".join(done.err.split())) == (way == "side")
    text = json.loads(remote.out)["text"]
    assert text == json.loads(local.out)["text"]
    assert text == greedy(finished(way).out, way, tiny_models["llama"])


def greedy(run: Path, way: str, directory: Path) -> str:
    """What the whole model with the run's adapter adds, one argmax after another; plain `peft` where it has it."""
    model = with_plain_peft(run, directory) if way == "top" else beside_the_whole(run, directory)
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT)["input_ids"]
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[len(tokenizer(PROMPT)["input_ids"]) :], skip_special_tokens=True))


def with_plain_peft(run: Path, directory: Path) -> torch.nn.Module:
    adapted: torch.nn.Module = peft.PeftModel.from_pretrained(whole_model(directory), run / "adapter").eval()
    return adapted


def beside_the_whole(run: Path, directory: Path) -> torch.nn.Module:
    report = RunReport.load(run)
    given = {"method": "local", "peft": "side", "data": "unused", "model": str(directory), "cut": report.cut}
    config = TrainConfig.model_validate({**given, **SIDE})
    edge = load_local(config)
    tuning = attach(edge.model, edge.found, edge.cut, config.placement)
    load_adapter(tuning, run / "adapter", None)
    return tuning.model


def test_the_adapter_of_a_top_run_loads_with_plain_peft_without_missing_keys_and_gives_the_same_logits(
    nodes: dict[str, Server], finished: Finish, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = finished("top").out
    whole = with_plain_peft(run, tiny_models["llama"])
    state = peft.get_peft_model_state_dict(whole)
    assert same_bits({name: value.detach() for name, value in state.items()}, learnt(run))
    config = run_settings("top", nodes["llama"].address, Path("unused"), tmp_path)
    ids_BT = torch.tensor([[7, 30, 41, 12, 99, 5, 23], [200, 31, 8, 64, 64, 9, 17]])
    with connected(nodes["llama"], "1:2", train="top", cache=tmp_path) as edge, torch.no_grad():
        before = edge.model(ids_BT, use_cache=False).logits
        tuning = attach(edge.model, edge.found, edge.cut, config.placement)
        load_adapter(tuning, run / "adapter", None)
        ours = tuning.model(ids_BT, use_cache=False).logits
        theirs = whole(ids_BT, use_cache=False).logits
    assert relative({"": ours}, {"": theirs}) < 1e-5
    assert relative({"": before}, {"": theirs}) > 1e-3, "an adapter that changes nothing compares nothing"
