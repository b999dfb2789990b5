"""Memory is measured exactly: the process's from the kernel, the tensors' from what autograd keeps."""

import gc
import mmap
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

from isthmus.ledger import memory
from isthmus.ledger.memory import TensorPeak, peak_bytes, reset_peak, resident_bytes

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp() -> nn.Sequential:
    """Float32; its parameters take (4*8+8 + 8*2+2) * 4 = 232 bytes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


SAVED = (3 * 4 + 3 * 8 + 3 * 2) * 4  # the input, the ReLU's output (saved twice), the square's input


@linux
def test_the_process_peak_remembers_what_was_freed_until_it_is_reset() -> None:
    if not reset_peak():
        pytest.skip("this kernel does not let a process reset its peak")
    size = 64 * 2**20
    before = peak_bytes()
    with mmap.mmap(-1, size) as block:  # not from malloc, which may keep what is freed
        block[::4096] = b"x" * (size // 4096)
    after = peak_bytes()
    assert before is not None
    assert after is not None
    assert after - before >= size * 0.9
    reset_peak()
    again, resident = peak_bytes(), resident_bytes()
    assert again is not None
    assert resident is not None
    assert again < after - size * 0.9
    assert resident <= again


def test_where_the_system_does_not_tell_there_is_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "none")
    assert (reset_peak(), peak_bytes(), resident_bytes()) == (False, None, None)


def test_an_mlp_is_counted_to_the_byte() -> None:
    model = mlp()
    tracker = TensorPeak(model)
    assert tracker.resident_bytes == tracker.live_bytes == tracker.peak_bytes == 232
    with tracker.saving():
        loss = model(torch.randn(3, 4)).square().sum()
    assert tracker.live_bytes == 232 + SAVED
    loss.backward()
    assert tracker.live_bytes == 232
    assert tracker.peak_bytes == 232 + SAVED


def test_a_graph_dropped_without_a_backward_is_freed_as_without_counting() -> None:
    tracker = TensorPeak()
    gc.disable()
    try:
        with tracker.saving():
            kept = torch.randn(8, requires_grad=True).exp().relu()
        assert tracker.live_bytes == 2 * 8 * 4
        del kept
        assert tracker.live_bytes == 0
    finally:
        gc.enable()


def test_views_of_one_storage_count_once_and_whole() -> None:
    tracker = TensorPeak()
    weight = torch.ones(1, requires_grad=True)
    whole = torch.randn(10)
    with tracker.saving():
        first = weight * whole[:2]
        second = weight * whole[5:]
    assert tracker.live_bytes == 40
    del first
    assert tracker.live_bytes == 40
    del second
    assert tracker.live_bytes == 0


def test_two_graphs_alive_at_once_add_up_in_the_peak() -> None:
    model = mlp()
    tracker = TensorPeak(model)
    with tracker.saving():
        losses = [model(torch.randn(3, 4)).square().sum() for _ in range(2)]
    for loss in losses:
        loss.backward()
    with tracker.saving():
        model(torch.randn(3, 4)).square().sum().backward()
    assert tracker.live_bytes == 232
    assert tracker.peak_bytes == 232 + 2 * SAVED


def test_held_state_counts_until_it_is_let_go() -> None:
    model = mlp()
    tracker = TensorPeak(model)
    tracker.hold("optimizer", 464)
    with tracker.saving():
        loss = model(torch.randn(3, 4)).square().sum()
    assert tracker.peak_bytes == 232 + 464 + SAVED
    loss.backward()
    tracker.hold("optimizer", 0)
    assert tracker.resident_bytes == tracker.live_bytes == 232
    with pytest.raises(ValueError, match="gradients"):
        tracker.hold("gradients", -1)


def test_a_module_that_grew_is_read_again_at_the_next_saving() -> None:
    model = mlp()
    tracker = TensorPeak(model)
    model.append(nn.Linear(2, 2))
    with tracker.saving():
        pass
    assert tracker.resident_bytes == 232 + 24


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    loss = model(x).exp().tanh().sum()
    first = torch.autograd.grad(loss, tuple(model.parameters()), create_graph=True)
    return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), tuple(model.parameters())))  # type: ignore[arg-type]


def test_gradients_of_first_and_second_order_are_bit_for_bit_those_without_counting() -> None:
    model, x = mlp(), torch.randn(3, 4)
    plain = gradients(model, x)
    with TensorPeak(model).saving():
        counted = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


def test_a_saved_tensor_changed_in_place_is_still_refused_by_the_backward() -> None:
    with TensorPeak().saving():
        leaf = torch.ones(3, requires_grad=True)
        base = leaf * 2
        loss = base.pow(2).sum()
    base.add_(1)
    with pytest.raises(RuntimeError, match="in-place"):
        torch.autograd.grad(loss, leaf)


def test_threads_with_graphs_of_their_own_leave_nothing_behind() -> None:
    model = mlp()
    tracker = TensorPeak(model)

    def run() -> None:
        with tracker.saving():
            for _ in range(100):
                torch.autograd.grad(model(torch.randn(3, 4)).square().sum(), tuple(model.parameters()))

    threads = [Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracker.live_bytes == 232
    assert 232 + SAVED <= tracker.peak_bytes <= 232 + 4 * SAVED
