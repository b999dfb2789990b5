"""Lines and servers that break while a pass waits at a port: the same gradients, and the same adapter."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_client.port_adapters import PortAdapters, PortWork
from isthmus.rows import Rows
from isthmus.wire.gen import backbone_pb2 as pb
from tests.dlora.cable import cable
from tests.dlora.frames import adapting
from tests.dlora.near import Near, near
from tests.faults.mortal import Mortal, mortal_server
from tests.faults.training import (
    WITHIN_S,
    Background,
    Learner,
    adapter,
    kill,
    moved,
    run_here,
    same_bits,
    settings,
    wait_until,
)
from tests.harness import Server

STEPS = 8
GRACE_S = 3
PARK = {"kr_active": 0.25, "kr_period": 2, "kr_warmup": 1, "kr_idle": "park"}
ROWS = Rows((5, 3), (0, 0))
GROUPS = 4
"""Questions in one pass: q and v of a block share their input."""


class Gate:
    """Where answers at ports wait while it is shut, so that passes wait for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = 0
        self._backward: bool | None = None
        self._opened = threading.Event()
        self._opened.set()
        answer = PortWork.answer

        def gated(work: PortWork, ask: pb.PortCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            if not self._opened.is_set() and ask.backward == self._backward:
                self.waiting += 1
                assert self._opened.wait(WITHIN_S)
            return answer(work, ask, tensors)

        monkeypatch.setattr(PortWork, "answer", gated)

    def shut(self, backward: bool) -> None:
        """Let what forwards or backwards ask wait from now on."""
        self.waiting, self._backward = 0, backward
        self._opened.clear()

    def open(self) -> None:
        """Let all through."""
        self._opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def dlora(server: Any, rows: Path, **changes: Any) -> Any:
    """A run on whatever has an address, with adapters at q and v of all blocks, the span's included."""
    usual = {"method": "dlora", "targets": ["q_proj", "v_proj"], "steps": STEPS, "rank": 4}
    return settings(server, rows, **{**usual, **changes})


def adapters_of(learner: Learner) -> PortAdapters:
    assert learner.edge.adapters is not None
    return learner.edge.adapters


def step_on(learner: Learner) -> list[torch.Tensor]:
    """The gradients of a batch."""
    (batch,) = learner.batches(0)
    return learner.gradients(learner.loss(batch))


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(this, that) for this, that in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def gradients(servers: dict[str, Server], rows: Path) -> list[torch.Tensor]:
    """Of an undisturbed step, of adapters that add something."""
    with adapting(dlora(servers["llama"], rows)) as learner:
        stir(learner)
        found = step_on(learner)
    assert all(moved([gradient]) for gradient in found)
    return found


@torch.no_grad()
def stir(learner: Learner) -> None:
    """Move every parameter, for B begins at zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in learner.tuning.trainable.values():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_line_cut_in_mid_exchange_costs_no_computing_and_changes_no_bit(
    servers: dict[str, Server], rows: Path, gate: Gate, gradients: list[torch.Tensor], backward: bool
) -> None:
    with (
        cable(servers["llama"].address) as line,
        adapting(dlora(line, rows)) as learner,
        ThreadPoolExecutor(1) as thread,
    ):
        stir(learner)
        gate.shut(backward)
        found = thread.submit(step_on, learner)
        wait_until(lambda: gate.waiting == 1, "a question")
        line.cut()
        wait_until(lambda: gate.waiting == 2, "the question to be asked again")
        gate.open()  # and both are answered
        assert equal(found.result(WITHIN_S), gradients)
        assert learner.ledger.total("train", "resent_bytes") > 0
        assert learner.ledger.total("train", "recomputed_calls") == 0


def test_with_nothing_kept_a_backward_asks_in_its_forward_again_and_the_ledger_says_so(
    tiny_models: dict[str, Path], rows: Path, gradients: list[torch.Tensor]
) -> None:
    asked = {}
    for budget in (1 << 30, 0):
        with (
            near(tiny_models["llama"], budget) as server,
            adapting(dlora(server, rows)) as learner,
        ):
            stir(learner)
            assert equal(step_on(learner), gradients)
            total = {name: learner.ledger.total("train", name) for name in FIGURES}
            asked[budget] = total.pop("round_trips")
            assert all(total.values()) if budget == 0 else not any(total.values()), total
    assert asked == {1 << 30: 2 + 2 * GROUPS, 0: 2 + 3 * GROUPS}


FIGURES = ("round_trips", "recomputed_calls", "cloud_recompute_flops", "resent_bytes")


@pytest.fixture(scope="module")
def parking(tiny_models: dict[str, Path], rows: Path) -> Callable[[int], Any]:
    """A server that keeps so much for backwards, and a learner with two adapters parked there."""

    def parked(budget: int) -> Iterator[tuple[Near, Learner]]:
        with (
            near(tiny_models["llama"], budget) as server,
            adapting(dlora(server, rows)) as learner,
        ):
            adapters = adapters_of(learner)
            sites = adapters.sites[:2]
            generator = torch.Generator().manual_seed(5)
            pairs = [
                (
                    torch.randn(2, linear.inputs, generator=generator),
                    torch.randn(linear.outputs, 2, generator=generator),
                )
                for linear in (adapters.linears[site] for site in sites)
            ]
            learner.remote.park(pairs, adapters.bitmap(sites))
            adapters.active = frozenset(adapters.sites[2:])
            yield server, learner

    return parked


@pytest.fixture(params=[1 << 30, 0], ids=["all kept", "nothing kept"])
def parked(parking: Callable[[int], Any], request: pytest.FixtureRequest) -> Iterator[tuple[Near, Learner]]:
    yield from parking(request.param)


def passed(learner: Learner, between: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    """What two forwards at once and their backwards answer; `between` comes between the two passes."""
    work = [adapters_of(learner).begin("train") for _ in range(2)]
    hidden_ND = torch.randn(ROWS.tokens, 32, generator=torch.Generator().manual_seed(1))
    both = ThreadPoolExecutor(2)
    try:
        sent = list(both.map(lambda one: learner.remote.forward(hidden_ND, ROWS, True, one), work, timeout=30))
        between()
        found = list(both.map(lambda one: learner.remote.backward(one[1], hidden_ND), sent, timeout=30))
    finally:
        both.shutdown(wait=False)  # what hangs ends with the line
    return [*(output for output, _ in sent), *found]


def test_what_was_parked_with_a_server_that_is_gone_is_parked_again(parked: tuple[Near, Learner]) -> None:
    server, learner = parked
    expected = passed(learner)
    server.restart()
    assert equal(passed(learner, between=server.restart), expected)


def test_so_it_is_before_a_generation_begins_and_while_it_goes_on(parked: tuple[Near, Learner]) -> None:
    server, learner = parked
    hidden_ND = torch.randn(ROWS.tokens, 32, generator=torch.Generator().manual_seed(1))
    begun = lambda: learner.remote.decode(hidden_ND, ROWS, None, adapters_of(learner).begin("eval"))[0]  # noqa: E731
    expected = begun()
    server.restart()
    assert torch.equal(begun(), expected)


@pytest.fixture(scope="module")
def mortal(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Mortal]:
    own, flags = tmp_path_factory.mktemp("mortal"), ("--cut", "1:1", "--grace", str(GRACE_S))
    with mortal_server(tiny_models["llama"], own, *flags) as mortal:
        yield mortal


@pytest.fixture
def server(mortal: Mortal) -> Server:
    return mortal.running()


@pytest.fixture(scope="module")
def undisturbed(
    servers: dict[str, Server], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, torch.Tensor]]:
    """The adapter of a run on a server that nobody touches."""

    def run(**changes: Any) -> dict[str, torch.Tensor]:
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        run_here(dlora(servers["llama"], rows, **changes), out)
        values = adapter(out)
        assert moved([value for name, value in values.items() if "lora_B" in name and ".layers.2." in name])
        return values

    return run


KILLED = {
    "in a forward": (False, {"microbatches": 1}),
    "in a backward, of 2 microbatches": (True, {"microbatches": 2}),
    "in a forward, of 2 microbatches, with adapters parked": (False, {"microbatches": 2, **PARK}),
}


@pytest.mark.parametrize(("backward", "changes"), KILLED.values(), ids=KILLED)
def test_a_server_killed_while_passes_wait_at_ports_and_restarted_changes_nothing(
    mortal: Mortal,
    server: Server,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    undisturbed: Callable[..., dict[str, torch.Tensor]],
    backward: bool,
    changes: dict[str, Any],
) -> None:
    run = Background(dlora(server, rows, **changes), tmp_path / "run", monkeypatch)
    run.reaches(4)
    gate.shut(backward)
    wait_until(lambda: gate.waiting == run.in_flight == changes["microbatches"], "the passes to wait")
    (edge,) = run._edges
    assert edge.remote is not None
    assert (edge.remote._parked is not None) == ("kr_idle" in changes)
    kill(server)
    mortal.restart()
    gate.open()
    report = run.result()
    assert report.status == "complete"
    assert report.cost.wire.resent_bytes > 0
    assert same_bits(adapter(run.out), undisturbed(**changes))


def test_a_server_told_to_stop_while_a_pass_waits_does_so_after_its_grace_and_the_run_goes_on_on_the_next(
    mortal: Mortal,
    server: Server,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    undisturbed: Callable[..., dict[str, torch.Tensor]],
) -> None:
    run = Background(dlora(server, rows), tmp_path / "run", monkeypatch)
    run.reaches(2)
    gate.shut(backward=False)
    wait_until(lambda: gate.waiting == 1, "a pass to wait")
    assert server.stop(signal.SIGTERM, within_s=GRACE_S + 20) == 0
    assert server.log.endswith("cloud_node: stopped\n")
    assert "Traceback" not in server.log
    run.must_go_on()
    mortal.restart()
    gate.open()
    assert run.result().status == "complete"
    assert same_bits(adapter(run.out), undisturbed())


def test_a_server_that_drains_finishes_the_pass_that_waits_and_leaves_the_rest_to_the_next(
    tiny_models: dict[str, Path], rows: Path, gate: Gate, gradients: list[torch.Tensor]
) -> None:
    with (
        near(tiny_models["llama"]) as server,
        adapting(dlora(server, rows)) as learner,
        ThreadPoolExecutor(2) as threads,
    ):
        stir(learner)
        gate.shut(backward=False)
        found = threads.submit(step_on, learner)
        wait_until(lambda: gate.waiting == 1, "a question")
        drained = threads.submit(server.drain, WITHIN_S)
        wait_until(lambda: server.draining, "the server to say so")
        gate.open()
        assert drained.result(WITHIN_S) < WITHIN_S / 2
        assert not found.done()  # its backward is refused there
        server.restart()
        assert equal(found.result(WITHIN_S), gradients)
        assert learner.ledger.total("train", "recomputed_calls") == 1
