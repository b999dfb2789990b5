"""A cloud node that dies loses nothing: the run goes on by itself, or later, and learns the same."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from edge_client.runs import RunDirectory
from isthmus.errors import UnreachableError
from isthmus.report.schema import RunReport
from tests.faults.conftest import Adapter
from tests.faults.mortal import Mortal, mortal_server
from tests.faults.training import (
    STEPS,
    WITHIN_S,
    Background,
    Learner,
    adapter,
    as_flags,
    is_one_line,
    kill,
    learning,
    paused,
    run_here,
    same_bits,
    settings,
    steps_done,
    wait_until,
)
from tests.harness import ENVIRONMENT, Server


@pytest.fixture(scope="module")
def mortal(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Mortal]:
    with mortal_server(tiny_models["llama"], tmp_path_factory.mktemp("restarted"), "--cut", "1:1") as mortal:
        yield mortal


@pytest.fixture
def server(mortal: Mortal) -> Server:
    return mortal.running()


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_server_killed_in_mid_step_and_restarted_on_its_port_changes_nothing(
    mortal: Mortal,
    server: Server,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Adapter],
    microbatches: int,
) -> None:
    expected = undisturbed(microbatches=microbatches)
    run = Background(settings(server, rows, microbatches=microbatches), tmp_path / "run", monkeypatch)
    run.reaches(3)
    with paused(server):
        wait_until(lambda: run.in_flight == microbatches, "the step's requests to be under way")
        run.must_go_on()
        kill(server)
    mortal.restart()
    report = run.result()
    assert report.status == "complete"
    assert same_bits(adapter(run.out), expected)
    assert report.cost.wire.resent_bytes > 0
    assert report.agreement is not None
    assert report.agreement.equal
    assert report.agreement.unchecked_streams == 1


def test_a_server_killed_between_forward_and_backward_gets_the_input_again(
    mortal: Mortal, server: Server, rows: Path
) -> None:
    with learning(settings(server, rows)) as edge:
        (batch,) = edge.batches(0)
        expected = edge.gradients(edge.loss(batch))
        assert edge.ledger.total("train", "recomputed_calls") == 0
        assert edge.ledger.total("train", "resent_bytes") == 0
        loss = edge.loss(batch)
        kill(server)
        mortal.restart()
        found = edge.gradients(loss)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert edge.ledger.total("train", "recomputed_calls") == 1
        assert edge.ledger.total("train", "resent_bytes") >= batch.real_tokens * 32 * 4
        recomputed = edge.ledger.total("train", "cloud_recompute_flops")
        assert 3 * recomputed == edge.ledger.total("train", "cloud_forward_flops")


def continuation(edge: Learner, between: Callable[[int], object]) -> list[int]:
    """Eight tokens, greedily; `between` is called before each decode request."""
    output = edge.tuning.model(**edge.edge.tokenizer("good and bad:", return_tensors="pt"), use_cache=True)
    tokens = []
    for number in range(8):
        tokens.append(int(output.logits[0, -1].argmax()))
        between(number)
        output = edge.tuning.model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
    return tokens


@torch.no_grad()
def test_a_generation_goes_on_when_the_server_that_held_its_cache_is_gone(
    mortal: Mortal, server: Server, rows: Path
) -> None:
    def restart(number: int) -> None:
        if number == 3:
            kill(server)
            mortal.restart()

    with learning(settings(server, rows)) as edge:
        expected = continuation(edge, lambda _: None)
        assert continuation(edge, restart) == expected


def test_a_server_that_never_returns_ends_the_run_in_words_and_the_run_resumes_later(
    server: Server,
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    undisturbed: Callable[..., Adapter],
) -> None:
    out = tmp_path / "run"
    flags = as_flags(settings(server, rows, patience=1.0))
    client = subprocess.Popen(
        [sys.executable, "-m", "edge_client", "train", *flags, "--out", str(out)],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: client.poll() is not None or steps_done(out) >= 7, "step 7")
    kill(server)
    _, said = client.communicate(timeout=WITHIN_S)
    assert client.returncode == UnreachableError.exit_code, said
    assert is_one_line(said), said
    assert server.address in said
    report = RunReport.load(out)
    assert report.status == "failed"
    assert 7 <= report.steps < STEPS
    assert report.agreement is not None
    assert report.agreement.unchecked_streams == 1
    assert any((out / "checkpoints").iterdir())
    assert not (out / "adapter").exists()

    resumed = RunDirectory(out).config().resumed({"server": servers["llama"].address})
    assert run_here(resumed, out, resume=True).status == "complete"
    assert same_bits(adapter(out), undisturbed(microbatches=1))
