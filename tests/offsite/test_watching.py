"""Looks at the true span while an emulator is tuned on: what they are compared with, and that they never end a run."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from edge_client import offsite as loading
from edge_client import watch
from edge_client.config import TrainConfig
from edge_client.finished import Using, evaluate
from edge_client.runs import RunDirectory
from edge_client.train import train
from isthmus.errors import (
    CertificateError,
    InterruptedRunError,
    IsthmusError,
    LimitError,
    ModelError,
    UnreachableError,
    VersionError,
)
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from isthmus.training.data import Example, TokenSequence
from isthmus.training.scoring import Scores
from tests.faults.training import adapter, kill, port_of, run_here, same_bits, settings, steps_done, wait_until
from tests.harness import Server, save_tiny_model, serving
from tests.offsite.by_hand import make_emulator

QUIET = Console(quiet=True)
NO_MORE = "no more looks at the true span"
GONE = "the server is gone, or does not answer"


@pytest.fixture(scope="module")
def emulators(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An emulator of each family's tiny model."""
    place = tmp_path_factory.mktemp("emulators")
    for family, model in tiny_models.items():
        make_emulator(place / family, model, "1:1", Ed25519PrivateKey.generate())
    return {family: place / family for family in tiny_models}


def offsite(folder: Path, data: Path, **changes: Any) -> TrainConfig:
    """Settings of a short run on an emulator that is here."""
    return settings(None, data, **{"method": "offsite", "emulator": str(folder), "cut": None, "steps": 6, **changes})


def told() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def stopped(config: TrainConfig, run: RunDirectory, step: int, monkeypatch: pytest.MonkeyPatch) -> RunReport:
    """A run whose user pressed Ctrl-C in its step of this number."""
    write = RunDirectory.write_metrics

    def stop(self: RunDirectory, **figures: Any) -> None:
        write(self, **figures)
        if figures["step"] == step:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_metrics", stop)
        with pytest.raises(InterruptedRunError):
            train(config, run, False, QUIET)
    return RunReport.load(run.path)


# ---- what a look is compared with


class Pretended:
    """Looks whose scores are pretended: of `rows` rows with so many nats each, every second `spread` above."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, *nats: float, spread: float = 0.1) -> None:
        self._rows, self._nats, self._spread = rows, iter(nats), spread
        self.console = told()
        monkeypatch.setattr(watch, "Counting", lambda *_: SimpleNamespace(score=self._scored))
        self._edge: Any = SimpleNamespace(
            phase=lambda _: nullcontext(), plugged_in=nullcontext, row_tokens=None, true_span={1: None}
        )
        self._tuning: Any = SimpleNamespace(
            model=None, changed=lambda: 1, values=dict, initial={}, load=lambda _: None, virtual_tokens=0
        )
        self.looks = self.begun()

    def begun(self) -> watch.Watch:
        """As at a run's start, or when it goes on."""
        example = Example(TokenSequence((1, 2), (False, True)))
        return watch.Watch(
            10, self._edge, self._tuning, Ledger(), [example] * self._rows, 32, self.console, lambda: None
        )

    def _scored(self, _: object, examples: Sequence[Example], *__: object) -> Scores:
        nats = next(self._nats)
        return Scores(
            tuple(nats + (self._spread if row % 2 else -self._spread) for row in range(len(examples))),
            (1,) * len(examples),
            (),
            1,
            1,
        )

    def warned(self, step: int) -> bool:
        """Whether a look after so many steps warns."""
        before = said(self.console)
        self.looks.look(step)
        return said(self.console) != before


def test_a_look_warns_where_its_rows_tell_that_plugging_in_is_worse_than_the_untouched_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretended = Pretended(monkeypatch, 50, 1.5, 2.0, 2.5)
    assert not pretended.warned(0)
    assert not pretended.warned(5)
    assert [point.step for point in pretended.looks.points] == [0]
    assert pretended.warned(10)
    assert "step 10, a look at 50 rows: Plugging in made things worse than the untouched model: loss +0.5000 [" in said(
        pretended.console
    )


def test_a_look_at_rows_that_do_not_tell_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Pretended(monkeypatch, 5, 2.5, 2.0).warned(10)
    pretended = Pretended(monkeypatch, 50, 2.5, 2.5)
    assert not pretended.warned(10)


def test_the_last_look_says_what_it_found_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, 50, 1.5, 2.0)
    pretended.looks.look(7, last=True)
    assert "step 7, a look at 50 rows: Plugging in gained over the untouched model: loss -0.5000 [" in said(
        pretended.console
    )


def test_what_looks_are_compared_with_outlasts_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = Pretended(monkeypatch, 50, 1.5, 2.0, 1.9)
    pretended.looks.look(10)
    state, pretended.looks = pretended.looks.state(), pretended.begun()
    pretended.looks.load(state)
    assert not pretended.warned(20)
    assert pretended.looks.untouched is not None
    assert pretended.looks.untouched.loss == pytest.approx(2.0)
    assert [point.step for point in pretended.looks.points] == [10, 20]


PLACEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"targets": ["q_proj", "up_proj", "lm_head"]}),
    "full": ("llama", {"peft": "full"}),
    "bitfit": ("gpt2", {"peft": "bitfit"}),
}


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_looks_that_begin_when_a_run_is_resumed_are_compared_with_the_untouched_model(
    kind: str,
    emulators: dict[str, Path],
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family, changes = PLACEMENTS[kind]
    address, run = servers[family].address, RunDirectory(tmp_path / "run")
    config = offsite(emulators[family], rows, eval_data=rows, lr=0.05, **changes)
    assert stopped(config, run, 2, monkeypatch).status == "interrupted"
    first = evaluate(run.path, rows, Using("remote", address), QUIET).score
    report = train(config.resumed({"watch": 4, "server": address}), run, True, QUIET)
    untouched = evaluate(run.path, rows, Using("remote", address, untouched=True), QUIET).score
    assert report.offsite is not None
    assert report.offsite.watched_untouched is not None
    assert report.offsite.watched_untouched.loss == pytest.approx(untouched.loss, rel=1e-6)
    assert abs((untouched.loss or 0) - (first.loss or 0)) > 1e-3
    assert [point.step for point in report.offsite.watched] == [4, 6]
    assert report.offsite.watched_rows == 24
    run_here(config, tmp_path / "straight")
    names = {"lora": "adapter_model.safetensors"}.get(kind, "adapter.safetensors")
    looked, straight = ((tmp_path / name / "adapter" / names).read_bytes() for name in ("run", "straight"))
    assert looked == straight, "looks change nothing of what is tuned"


def test_rows_that_the_server_does_not_take_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = (Example(TokenSequence((1,) * length, (False,) + (True,) * (length - 1))) for length in (9, 4))
    edge: Any = SimpleNamespace(row_tokens=4)
    looks = watch.Watch(
        1,
        edge,
        SimpleNamespace(virtual_tokens=0),  # type: ignore[arg-type]
        Ledger(),
        [long, short, long, short],
        32,
        QUIET,
        lambda: None,
    )
    assert looks._rows() == [short, short]
    edge.row_tokens = 3
    with pytest.raises(LimitError, match="every row is longer than the 3 tokens that the server takes"):
        looks._rows()


# ---- a look that fails


@pytest.mark.parametrize(
    "error", [ModelError, LimitError, CertificateError, VersionError, UnreachableError], ids=lambda error: error.code
)
def test_whatever_a_look_fails_with_ends_the_looks_and_not_the_run(
    error: type[IsthmusError],
    emulators: dict[str, Path],
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = watch.Counting.score, iter(range(9))

    def failing(*given: Any) -> Scores:
        if next(calls) == 1:
            raise error("as it happens")
        return real(*given)

    monkeypatch.setattr(watch, "Counting", type("Counting", (watch.Counting,), {"score": failing}))
    config, console = offsite(emulators["llama"], rows, watch=2, server=servers["llama"].address), told()
    report = train(config, RunDirectory(tmp_path / "run"), False, console)
    assert report.status == "complete"
    assert report.offsite is not None
    assert [point.step for point in report.offsite.watched] == [0]
    reason = GONE if error.retryable else "as it happens"
    assert said(console).count(f"step 2: {NO_MORE}: {reason}; tuning goes on") == 1
    assert said(console).count(NO_MORE) == 1


@pytest.fixture
def own(tiny_models: dict[str, Path], cache: Path) -> Iterator[Server]:
    """A server that a test may stop."""
    with serving(tiny_models["llama"], "--cut", "1:1", cache=cache) as server:
        yield server


@pytest.mark.parametrize("comes_up", [False, True], ids=["nothing", "another model"])
def test_tuning_goes_on_within_seconds_when_its_server_goes_away(
    comes_up: bool,
    emulators: dict[str, Path],
    own: Server,
    rows: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the patience of a run that cannot do without its server."""
    monkeypatch.setattr(loading, "LOOK_PATIENCE_S", 30.0 if comes_up else 0.5)
    console, run = told(), RunDirectory(tmp_path / "run")
    config = offsite(emulators["llama"], rows, server=own.address, watch=40, steps=80, patience=120.0)
    thread = threading.Thread(target=lambda: train(config, run, False, console))
    thread.start()
    wait_until(lambda: steps_done(run.path) > 3, "step 3")
    kill(own)
    if comes_up:
        save_tiny_model(tmp_path / "other", "llama", seed=1)
        with serving(tmp_path / "other", "--cut", "1:1", cache=cache, port=port_of(own)):
            thread.join(60)
    thread.join(60)
    report = RunReport.load(run.path)
    assert (report.status, report.steps) == ("complete", 80)
    assert report.offsite is not None
    assert [point.step for point in report.offsite.watched] in ([0], [0, 40])
    assert NO_MORE in said(console)
    assert comes_up or f"{GONE}; tuning goes on" in said(console)


def test_who_asks_to_stop_while_a_look_waits_for_its_server_is_obeyed_at_once(
    emulators: dict[str, Path], own: Server, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, asked = watch.Counting.score, iter(range(9)), []

    def ask() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    def hanging(*given: Any) -> Scores:
        if next(calls) == 1:
            own.process.send_signal(signal.SIGSTOP)
            threading.Timer(0.3, ask).start()
        return real(*given)

    monkeypatch.setattr(watch, "Counting", type("Counting", (watch.Counting,), {"score": hanging}))
    config, console = offsite(emulators["llama"], rows, watch=2, server=own.address, patience=120.0), told()
    try:
        with pytest.raises(InterruptedRunError, match="stopped after step 2; go on with"):
            train(config, RunDirectory(tmp_path / "run"), False, console)
        assert time.monotonic() - asked[0] < 10
    finally:
        own.process.send_signal(signal.SIGCONT)
    report = RunReport.load(tmp_path / "run")
    assert (report.status, report.steps) == ("interrupted", 2)
    assert NO_MORE not in said(console)


def test_what_looks_take_is_counted_apart_from_training(
    emulators: dict[str, Path], servers: dict[str, Server], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = watch.Counting.score

    def slow(*given: Any) -> Scores:
        time.sleep(0.4)
        return real(*given)

    monkeypatch.setattr(watch, "Counting", type("Counting", (watch.Counting,), {"score": slow}))
    config = offsite(emulators["llama"], rows, watch=3, server=servers["llama"].address)
    first = stopped(config, RunDirectory(tmp_path / "run"), 4, monkeypatch).offsite
    assert first is not None
    assert first.watched_seconds is not None
    assert first.watched_seconds > 0.8, "two looks"
    report = train(config, RunDirectory(tmp_path / "run"), True, QUIET)
    assert report.offsite is not None
    assert (report.offsite.watched_seconds or 0) > first.watched_seconds + 0.4
    assert (report.train_seconds or 0) < 0.4 * report.steps
    assert report.offsite.bundle_bytes == sum(
        path.stat().st_size for path in emulators["llama"].iterdir() if not path.name.startswith("manifest")
    )


def test_a_watched_run_is_resumed_without_its_server_and_says_that_looks_are_over(
    emulators: dict[str, Path], own: Server, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = offsite(emulators["llama"], rows, server=own.address, watch=2)
    for name, given in (("goes on", {}), ("gives up", {"watch": 0})):
        run, console = RunDirectory(tmp_path / name), told()
        if own.process.poll() is None:
            stopped(config, run, 3, monkeypatch)
            stopped(config, RunDirectory(tmp_path / "gives up"), 3, monkeypatch)
            kill(own)
        report = train(run.config().resumed(given), run, True, console)
        assert (report.status, report.steps) == ("complete", 6)
        assert (NO_MORE in said(console)) == (name == "goes on")
        assert report.offsite is not None
        assert [point.step for point in report.offsite.watched] == ([0, 2] if name == "goes on" else [])
    run_here(offsite(emulators["llama"], rows), tmp_path / "straight")
    assert same_bits(adapter(tmp_path / "goes on"), adapter(tmp_path / "straight"))
    assert same_bits(adapter(tmp_path / "gives up"), adapter(tmp_path / "straight"))


def test_a_new_run_whose_looks_cannot_begin_is_refused_and_may_be_given_again(
    emulators: dict[str, Path], own: Server, rows: Path, tmp_path: Path
) -> None:
    kill(own)
    config = offsite(emulators["llama"], rows, server=own.address, watch=2)
    with pytest.raises(UnreachableError):
        run_here(config, tmp_path / "run")
    assert run_here(offsite(emulators["llama"], rows), tmp_path / "run").status == "complete"


def test_a_prompt_is_something_though_no_weight_differs(
    emulators: dict[str, Path], servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    given = {"server": servers["llama"].address, "watch": 6, "peft": "prompt", "peft_option": {"num_virtual_tokens": 3}}
    run = RunDirectory(tmp_path / "run")
    offsite_run = train(offsite(emulators["llama"], rows, **given), run, False, QUIET).offsite
    assert offsite_run is not None
    first = offsite_run.watched[0]
    assert offsite_run.watched_untouched is not None
    assert first.loss != offsite_run.watched_untouched.loss
