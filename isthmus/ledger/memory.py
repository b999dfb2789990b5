"""Memory: what the process took from the operating system, and what its tensors held for the backward pass.

Knows /proc and autograd's saved tensors; decides nothing and keeps no history beyond the peak.
"""

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Final

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_PROC: Final = Path("/proc/self")


def reset_peak() -> bool:
    """Start the process's high-water mark anew from what is resident now (Linux, proc(5): `clear_refs`).

    Returns:
        Whether it was reset; if not, `peak_bytes` goes back to the start of the process.
    """
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """The process's high-water mark in bytes (VmHWM), None where the system does not tell.

    Not `ru_maxrss`: in a child process that starts at its parent's.
    """
    return _status("VmHWM")


def resident_bytes() -> int | None:
    """What of the process is in memory now, in bytes (VmRSS), None where the system does not tell."""
    return _status("VmRSS")


def _status(field: str) -> int | None:
    with suppress(OSError):
        found = re.search(rf"^{field}:\s*(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


class TensorPeak:
    """Bytes of live tensors: what stays (parameters, buffers, held state) and what autograd saves for a backward.

    Each storage counts once, whole, however many views of it are saved, and for as long as autograd keeps it.
    Intermediate tensors that nothing saves are not seen, nor what activation checkpointing computes again. Any
    number of threads may each build and run their own graph.
    """

    def __init__(self, *modules: nn.Module) -> None:
        """Watch modules; their parameters and buffers are read afresh at each `saving`, unless told otherwise."""
        self._modules = modules
        self._lock = Lock()
        # Tensors die at any moment, inside the lock too: __del__ only appends here, and the next reading settles.
        self._dropped: deque[int] = deque()
        self._references: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._saved = 0
        self._held: dict[str, int] = {}
        self._resident: frozenset[int] = frozenset()
        self._parameters = 0
        self._peak = 0
        self._read_modules()

    @contextmanager
    def saving(self, anew: bool = True) -> Iterator[None]:
        """Count what this thread's autograd saves in here; gradients stay exactly those without counting.

        Args:
            anew: read the modules' parameters and buffers; not where that was done since they last changed.
        """
        if anew:
            self._read_modules()
        with saved_tensors_hooks(self._pack, _Saved.unpack):
            yield

    def hold(self, name: str, size: int) -> None:
        """Say that `size` bytes of other state, such as gradients or an optimizer's, are held from now on under a name.

        Raises:
            ValueError: the size is below 0.
        """
        if size < 0:
            raise ValueError(f"{name} cannot hold {size} bytes")
        with self._lock:
            self._held[name] = size
            self._settle()

    @property
    def resident_bytes(self) -> int:
        """Parameters, buffers and what `hold` named."""
        with self._lock:
            return self._stays()

    @property
    def live_bytes(self) -> int:
        """What stays and what autograd has saved, now."""
        with self._lock:
            self._settle()
            return self._stays() + self._saved

    @property
    def peak_bytes(self) -> int:
        """The greatest `live_bytes` there was since it began, or began anew."""
        with self._lock:
            self._settle()
            return self._peak

    def begin_anew(self) -> None:
        """Let the peak begin again from what is live now."""
        with self._lock:
            self._settle()
            self._peak = self._stays() + self._saved

    def _read_modules(self) -> None:
        resident: dict[int, int] = {}
        for module in self._modules:
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                resident[storage._cdata] = storage.nbytes()
        with self._lock:
            self._resident = frozenset(resident)
            self._parameters = sum(resident.values())
            self._settle()

    def _pack(self, tensor: Tensor) -> "_Saved":
        storage = tensor.untyped_storage()
        key: int = storage._cdata  # its address in memory is 0 on the meta device
        with self._lock:
            self._settle()
            counted = key not in self._resident
            if counted:
                self._references[key] = self._references.get(key, 0) + 1
                if key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self._saved += self._sizes[key]
                    self._peak = max(self._peak, self._stays() + self._saved)
        return _Saved(tensor, key, self._dropped if counted else None)

    def _stays(self) -> int:
        return self._parameters + sum(self._held.values())

    def _settle(self) -> None:
        """Take what has died off the count, then look at the peak; the caller holds the lock."""
        while self._dropped:
            key = self._dropped.popleft()
            self._references[key] -= 1
            if not self._references[key]:
                del self._references[key]
                self._saved -= self._sizes.pop(key)
        self._peak = max(self._peak, self._stays() + self._saved)


class _Saved:
    """One saved tensor, which reports its own end."""

    __slots__ = ("_dropped", "_key", "_tensor", "_version")

    def __init__(self, tensor: Tensor, key: int, dropped: deque[int] | None) -> None:
        # An operation's output that kept its history here would hold the graph that holds it, for ever.
        self._tensor = tensor.detach()
        self._version = tensor._version
        self._key = key
        self._dropped = dropped

    def unpack(self) -> Tensor:
        """The tensor, refused if it was changed since: autograd skips this check of its own where hooks are set."""
        if self._tensor._version != self._version:
            raise RuntimeError("a tensor needed for the backward pass was modified by an in-place operation")
        return self._tensor

    def __del__(self) -> None:
        # Before the storage is free, so that its address cannot have been taken again.
        if self._dropped is not None:
            self._dropped.append(self._key)
