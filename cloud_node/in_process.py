"""The engine that runs spans in this process, on one device, one request at a time.

Knows spans, sessions by name, activations, decode caches and parked adapters; knows no wire and no identities.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Lock

import torch

from cloud_node.activations import ActivationStore, Kept
from cloud_node.engine import ASKED, Answer, Asked, EngineCard, Load, Opening, Place, Work
from cloud_node.round_trips import Edge, Parked, Question, RoundTrips, asking
from cloud_node.span import DecodeState, Span
from isthmus.cut import Cut
from isthmus.errors import LimitError, NotKeptError, WireError
from isthmus.linears import Site
from isthmus.ports import TAP, Port
from isthmus.rows import Rows

SEQUENCES_PER_SESSION = 16

PARKED_BYTES = 1 << 26
"""Of a session's parked adapters, whatever its share of the activation budget."""


@dataclass
class _Session:
    span: Span
    ports: tuple[Port, ...] = ()
    sequences: dict[str, DecodeState] = field(default_factory=dict)  # the oldest first; guarded by the engine's lock
    parked: tuple[int, dict[Site, Parked]] = (0, {})
    alone: Lock = field(default_factory=Lock)  # held before the device's turn, never within it

    @property
    def tapped(self) -> bool:
        """Whether its ports are taps."""
        return any(port.kind == TAP for port in self.ports)


class InProcessEngine:
    """Runs spans in this process, on one device, one request at a time."""

    def __init__(self, spans: Mapping[Cut, Span], device: str, hidden_size: int, activation_budget: int) -> None:
        """Serve one span for each cut offered; they share their weights."""
        self._spans = dict(spans)
        self._sessions: dict[str, _Session] = {}
        self._budget = activation_budget
        self._store = ActivationStore(activation_budget, lambda: len(self._sessions))
        self._turn = Lock()
        self._caches = Lock()
        weights = {address: size for span in self._spans.values() for address, size in span.storages.items()}
        self._resident = sum(weights.values())
        self._peak: int = self._resident
        self._bytes_per_position: dict[Cut, float] = {}  # of the span's last forward that was kept
        precision = next(iter(self._spans.values())).precision
        linears = {site: linear for span in self._spans.values() for site, linear in span.linears.items()}
        self._card = EngineCard(tuple(self._spans), hidden_size, precision, device, linears)

    def describe(self) -> EngineCard:
        """See `Engine`."""
        return self._card

    def open(self, session: str, opening: Opening) -> None:
        """See `Engine`."""
        self._sessions.setdefault(session, _Session(self._spans[opening.cut], opening.ports))

    def close(self, session: str) -> None:
        """See `Engine`."""
        self._sessions.pop(session, None)
        self._store.forget(session)

    def forward(
        self, session: str, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, keep: bool, asked: Asked = ASKED
    ) -> Answer:
        """See `Engine`."""
        opened, work = self._opened(session), Work()
        if opened.tapped:
            return self._forward_tapped(opened, hidden_ND, rows, work)
        size = self._expected(opened, rows, asked) if keep else 0
        keep = keep and self._store.begin(session, size)
        try:
            # Before any graph was measured one runs at a time: passes that wait at ports hold theirs together.
            with opened.alone if keep and not size else nullcontext(), self._device(work):
                kept = self._run(opened, hidden_ND, rows, work, keep, asked)
        finally:
            if keep:
                self._store.end(session, size)
        return Answer(kept.output_ND.detach(), work, keep and self._keep(session, microbatch, kept, asked))

    def backward(
        self,
        session: str,
        microbatch: int,
        grad_KD: torch.Tensor,
        again: tuple[torch.Tensor, Rows] | None,
        asked: Asked = ASKED,
    ) -> Answer:
        """See `Engine`."""
        opened, work = self._opened(session), Work()
        kept = self._store.take(session, microbatch)
        if kept is None and again is None:
            raise NotKeptError(f"activations of microbatch {microbatch} are gone; send its input again")
        size = kept.size if kept is not None else 0
        self._store.begin(session, size, must=True)
        try:
            # A forward that runs again had no room before: one at a time.
            with opened.alone if kept is None else nullcontext(), self._device(work):
                if kept is None and again is not None:
                    kept = self._run(opened, *again, work, True, asked)
                    work.recompute_flops = work.forward_flops
                if kept is None or grad_KD.shape != kept.output_ND.shape:
                    raise WireError(f"a gradient of shape {tuple(grad_KD.shape)} is not that of the forward's output")
                grad_ND = self._differentiate(kept, grad_KD, work, asked)
        finally:
            self._store.end(session, size)
        work.backward_flops = _backward_flops(opened, kept, asked)
        return Answer(grad_ND, work)

    def decode(
        self,
        session: str,
        microbatch: int,
        hidden_ND: torch.Tensor,
        rows: Rows,
        place: Place,
        asked: Asked = ASKED,
    ) -> Answer:
        """See `Engine`."""
        opened, work = self._opened(session), Work()
        with self._caches:
            state = opened.sequences.pop(place.sequence, None) if place.start else None
        if place.start:
            state = _truncated(state, rows, place)
        index_N = rows.index(left=True) if rows.mask(left=True) is not None else None
        with self._device(work), self._asking(opened, index_N, work, False, asked), _timed(work, "forward_s"):
            output_KD, state = opened.span.decode(hidden_ND, rows, state)
        state.made_by.append((microbatch, state.width))
        with self._caches:
            opened.sequences[place.sequence] = state
            self._evict(opened)
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest, context=state.width)
        work.forward_flops += _parked_flops(opened, rows, asked)
        self._note_peak(0)
        return Answer(output_KD, work)

    def park(self, session: str, microbatch: int, adapters: Mapping[Site, Parked]) -> Answer:
        """See `Engine`."""
        opened = self._opened(session)
        span, held = opened.span, {}
        for site, adapter in adapters.items():
            linear = span.linears[site]
            rank = len(adapter.down_RI)
            if adapter.down_RI.shape != (rank, linear.inputs) or adapter.up_OR.shape != (linear.outputs, rank):
                raise WireError(f"a parked adapter does not fit {site[1]} of block {site[0]}")
            if rank > min(linear.inputs, linear.outputs):
                raise WireError(f"a parked adapter of rank {rank} is larger than {site[1]} of block {site[0]}")
            held[site] = Parked(adapter.down_RI.to(span.device), adapter.up_OR.to(span.device))
        most = max(PARKED_BYTES, self._store.share())
        if sum(adapter.nbytes for adapter in held.values()) > most:
            raise LimitError(f"parked adapters of more than {most} bytes; park fewer, or smaller ones")
        opened.parked = (microbatch, held)
        self._note_peak(0)
        return Answer(torch.empty(0, 0), Work())

    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """See `Engine`."""
        for microbatch in microbatches:
            self._store.take(session, microbatch)
        if opened := self._sessions.get(session):
            with self._caches:
                for sequence in sequences:
                    opened.sequences.pop(sequence, None)

    def load(self) -> Load:
        """See `Engine`."""
        return Load(
            weight_bytes=self._resident,
            held_bytes=self._store.held_bytes + self._caches_bytes(),
            budget_bytes=self._budget,
            peak_bytes=self._peak,
        )

    def stop(self) -> None:
        """See `Engine`."""

    def _run(
        self, opened: _Session, hidden_ND: torch.Tensor, rows: Rows, work: Work, graph: bool, asked: Asked
    ) -> Kept:
        span = opened.span
        saved = _SavedBytes(span)
        index_N = rows.index() if rows.mask() is not None else None
        with (
            torch.set_grad_enabled(graph),
            self._asking(opened, index_N, work, graph, asked) as trips,
            _timed(work, "forward_s"),
            saved.counting(),
        ):
            below = graph and (asked.input_gradient or trips is None)
            hidden_ND = hidden_ND.to(span.device, span.dtype).requires_grad_(below)
            output_ND = span.forward(hidden_ND, rows)
        work.forward_flops += span.flops.forward.of(len(rows.lengths), rows.longest)
        work.forward_flops += _parked_flops(opened, rows, asked)
        return Kept(hidden_ND, output_ND, rows, saved.total, trips)

    @contextmanager
    def _asking(
        self, opened: _Session, index_N: torch.Tensor | None, work: Work, graph: bool, asked: Asked
    ) -> Iterator[RoundTrips | None]:
        """Add what the edge answers, and what it has parked, in here."""
        version, parked = opened.parked
        if asked.parked and asked.parked != version:
            raise NotKeptError("the parked adapters are gone; send them again")
        if asked.edge is None:
            yield None
            return
        held = parked if asked.parked else {}
        edge = _Waiting(asked.edge, self._turn, work)
        trips = RoundTrips(asked.sites, held, opened.span.linears, edge, index_N, graph)
        try:
            with asking(trips):
                yield trips
        finally:
            trips.forget()

    def _forward_tapped(self, opened: _Session, hidden_ND: torch.Tensor, rows: Rows, work: Work) -> Answer:
        with self._device(work), _timed(work, "forward_s"):
            output_KD, taps_NW = opened.span.forward_tapped(hidden_ND, rows, opened.ports)
        positions = len(rows.lengths) * rows.longest
        projected = 2 * positions * hidden_ND.shape[1] * sum(port.width for port in opened.ports)
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest) + projected
        return Answer(output_KD, work, taps_NW=taps_NW)

    def _opened(self, session: str) -> _Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise NotKeptError("the session was closed; open it again") from None

    def _evict(self, opened: _Session) -> None:
        """Hold a session's decode caches to its share of the budget, and to a number; the oldest goes first."""
        share = self._budget // max(1, len(self._sessions))
        while opened.sequences and (
            len(opened.sequences) > SEQUENCES_PER_SESSION
            or sum(state.size for state in opened.sequences.values()) > share
        ):
            del opened.sequences[next(iter(opened.sequences))]

    def _expected(self, opened: _Session, rows: Rows, asked: Asked) -> int:
        """Bytes that a graph will hold, by the last one of this cut; 0 before there was any."""
        whole = self._bytes_per_position.get(opened.span.cut, 0.0) * len(rows.lengths) * rows.longest
        return math.ceil(whole * _depth(opened, asked))

    def _keep(self, session: str, microbatch: int, kept: Kept, asked: Asked) -> bool:
        rows = kept.rows
        opened = self._sessions.get(session)
        if opened is None:
            return False
        if depth := _depth(opened, asked):
            self._bytes_per_position[opened.span.cut] = kept.size / (len(rows.lengths) * rows.longest * depth)
        self._note_peak(kept.size)
        is_kept = self._store.keep(session, microbatch, kept)
        if session not in self._sessions:  # closed meanwhile: nobody will ask for it, nor free it
            self._store.forget(session)
        return is_kept

    def _differentiate(self, kept: Kept, grad_KD: torch.Tensor, work: Work, asked: Asked) -> torch.Tensor:
        """The gradient of the input [N, D]; [0, D] where nothing below the span needs one."""
        grad_KD = grad_KD.to(kept.output_ND.device, kept.output_ND.dtype)
        inputs = [kept.hidden_ND] if kept.hidden_ND.requires_grad else []
        if kept.trips is not None and kept.trips.reached:
            if asked.edge is None:
                raise WireError("this backward belongs to a forward with ports; name them")
            kept.trips.edge = _Waiting(asked.edge, self._turn, work)
            inputs.append(kept.trips.anchor)
        if not inputs:
            return grad_KD[:0]
        # A backward that waits at a port must not hold the device's only autograd thread.
        with torch.autograd.set_multithreading_enabled(False), _timed(work, "backward_s"):
            grad, *_ = torch.autograd.grad(kept.output_ND, inputs, grad_KD)
        return grad if kept.hidden_ND.requires_grad else grad_KD[:0]

    @contextmanager
    def _device(self, work: Work) -> Iterator[None]:
        asked = time.perf_counter()
        with self._turn:
            work.queue_s += time.perf_counter() - asked
            try:
                yield
            except torch.OutOfMemoryError:
                raise LimitError("the cloud's device is out of memory for this request; send smaller batches") from None

    def _note_peak(self, more: int) -> None:
        self._peak = max(self._peak, self._resident + self._store.held_bytes + more + self._caches_bytes())

    def _caches_bytes(self) -> int:
        """Bytes of decode caches and parked adapters."""
        with self._caches:
            opened = list(self._sessions.values())
            caches = sum(state.size for session in opened for state in session.sequences.values())
            return caches + sum(adapter.nbytes for session in opened for adapter in session.parked[1].values())


def _truncated(state: DecodeState | None, rows: Rows, place: Place) -> DecodeState:
    """The state as it was after request `place.after`, which must have left it `place.start` wide."""
    if len(set(rows.lengths)) > 1:
        raise WireError("rows that continue a sequence must bring equally many tokens")
    if state is None or (place.after, place.start) not in state.made_by:
        raise NotKeptError(f"the cache of sequence {place.sequence} is gone; send its past again")
    if state.mask_BT.shape[0] != len(rows.lengths):
        raise WireError(f"{len(rows.lengths)} rows do not continue a sequence of {state.mask_BT.shape[0]}")
    state.truncate(place.start)
    return state


def _parked_flops(opened: _Session, rows: Rows, asked: Asked) -> int:
    """Floating-point operations of what is added without the edge, in one pass."""
    held = opened.parked[1] if asked.parked else {}
    values = sum(adapter.values for site, adapter in held.items() if site not in asked.sites)
    return 2 * len(rows.lengths) * rows.longest * values


def _backward_flops(opened: _Session, kept: Kept, asked: Asked) -> int:
    """Floating-point operations of a backward: of all blocks, or of those down to the lowest that has a port."""
    whole = opened.span.flops.backward.of(len(kept.rows.lengths), kept.rows.longest)
    return round((whole + _parked_flops(opened, kept.rows, asked)) * _depth(opened, asked))


def _depth(opened: _Session, asked: Asked) -> float:
    """The share of the span's blocks that a backward goes through: all, or those down to the lowest with a port."""
    if asked.input_gradient or asked.edge is None:
        return 1.0
    span = opened.span.blocks
    return (span[-1] + 1 - min((block for block, _ in asked.sites), default=span[-1] + 1)) / len(span)


class _Waiting:
    """An edge before whose answers others may use the device."""

    def __init__(self, edge: Edge, turn: Lock, work: Work) -> None:
        self._edge = edge
        self._turn = turn
        self._work = work

    def ask(self, question: Question) -> list[torch.Tensor]:
        """See `cloud_node.round_trips.Edge`."""
        began = time.perf_counter()
        self._turn.release()
        try:
            return self._edge.ask(question)
        finally:
            answered = time.perf_counter()
            self._turn.acquire()
            self._work.queue_s += time.perf_counter() - answered
            self._work.port_s += answered - began


@contextmanager
def _timed(work: Work, figure: str) -> Iterator[None]:
    """Add up the seconds in here, but for those in which the pass waited at a port or for the device after it."""
    began, waited = time.perf_counter(), work.port_s + work.queue_s
    yield
    spent = time.perf_counter() - began - (work.port_s + work.queue_s - waited)
    setattr(work, figure, getattr(work, figure) + max(0.0, spent))


class _SavedBytes:
    """Bytes that a graph holds besides the span's own weights, each storage counted once."""

    def __init__(self, span: Span) -> None:
        self._weights = span.storages
        self._seen: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._seen.values())

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that kept its history here would hold its own graph for ever
