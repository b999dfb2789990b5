"""The engine that runs spans in this process, on one device: tenants take turns, and small requests join in one.

Knows spans, sessions by name, activations, decode caches and parked adapters; knows no wire, and tenants as names.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Lock

import torch

from cloud_node.activations import ROOM_WITHIN_S, SMALL_GRAPH, ActivationStore, Kept, SavedBytes
from cloud_node.batching import ROWS, Batch, Request
from cloud_node.caches import DecodeCaches
from cloud_node.engine import ASKED, Answer, Asked, EngineCard, Load, Opening, Place, Work
from cloud_node.opened import OpenSession
from cloud_node.pausing import PausingEdge, timed
from cloud_node.round_trips import Parked, RoundTrips, asking
from cloud_node.span import DecodeState, Span
from cloud_node.turns import Ticket, Turns, cost_of
from isthmus.cut import Cut
from isthmus.errors import IsthmusError, LimitError, NotKeptError, WireError
from isthmus.linears import Site
from isthmus.rows import Rows

PARKED_BYTES = 1 << 26
"""Of a session's parked adapters, whatever its share of the activation budget."""

CACHES_SHARE = 2
"""Where sessions train, decode caches may take the budget divided by this; graphs have what they leave."""

FAILS = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, IsthmusError)
"""What one request among others may make of a run: memory that is not there, a position that is not."""


class InProcessEngine:
    """Runs spans in this process, on one device, which one request has at a time, or several that are joined."""

    def __init__(
        self,
        spans: Mapping[Cut, Span],
        device: str,
        hidden_size: int,
        activation_budget: int,
        joined_rows: int = ROWS,
    ) -> None:
        """Serve one span for each cut offered; they share their weights.

        Args:
            spans: by cut.
            device: where they run.
            hidden_size: of the model.
            activation_budget: bytes that graphs and decode caches may take.
            joined_rows: how many rows of several requests are computed together at most; 1: each request by itself.
        """
        self._spans = dict(spans)
        self._sessions: dict[str, OpenSession] = {}
        self._budget = activation_budget
        self._joined_rows = joined_rows
        self._caches = DecodeCaches(lambda: activation_budget // (CACHES_SHARE if self._keepers() else 1))
        self._store = ActivationStore(activation_budget, self._keepers, lambda: self._caches.held_bytes)
        self._turns: Turns[Request] = Turns()
        self._changing = Lock()  # held while sessions come, go, or are left something
        self._batches: Counter[int] = Counter()  # changed by whoever has the turn
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
        with self._changing:
            self._sessions.setdefault(session, OpenSession(session, self._spans[opening.cut], opening))

    def close(self, session: str) -> None:
        """See `Engine`."""
        with self._changing:
            self._sessions.pop(session, None)
            self._store.forget(session)
            self._caches.forget(session)
            self._turns.dismiss(session)

    def forward(
        self, session: str, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, keep: bool, asked: Asked = ASKED
    ) -> Answer:
        """See `Engine`."""
        opened, work = self._opened(session), Work()
        if opened.tapped:
            return self._forward_tapped(opened, hidden_ND, rows, work)
        if not keep and not opened.ports:
            return self._forward_unkept(opened, hidden_ND, rows, work)
        if keep:
            self._admit(opened)
        ticket, asked = self._ticket(opened, rows, 1, asked, work)
        size = self._expected(opened, rows, asked) if keep else 0
        keep = keep and self._store.begin(session, size, patience_s=ROOM_WITHIN_S)
        try:
            # Before any graph was measured one runs at a time: passes that wait at ports hold theirs together.
            with opened.unmeasured if keep and not size else nullcontext(), self._device(ticket, work):
                kept = self._run(opened, hidden_ND, rows, work, keep, asked)
        finally:
            if keep:
                self._store.end(session, size)
        return Answer(kept.output_ND.detach(), work, keep and self._keep(opened, microbatch, kept, asked))

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
        if kept is not None:
            rows, passes, size = kept.rows, 2, kept.size
        elif again is not None:
            rows, passes, size = again[1], 3, 0
        else:
            raise NotKeptError(f"activations of microbatch {microbatch} are gone; send its input again")
        ticket, asked = self._ticket(opened, rows, passes, asked, work)
        self._store.begin(session, size, must=True)
        try:
            # A forward that runs again had no room before: one at a time.
            with opened.unmeasured if kept is None else nullcontext(), self._device(ticket, work):
                if kept is None and again is not None:
                    kept = self._run(opened, *again, work, True, asked)
                    work.recompute_flops = work.forward_flops
                if kept is None or grad_KD.shape != kept.output_ND.shape:
                    raise WireError(f"a gradient of shape {tuple(grad_KD.shape)} is not that of the forward's output")
                grad_ND = self._differentiate(opened.span, kept, grad_KD, work, asked)
        finally:
            self._store.end(session, size)
        work.backward_flops = opened.backward_flops(kept.rows, asked)
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
        state = DecodeState.empty(len(rows.lengths))
        if place.start:
            state = _truncated(self._caches.take(session, place.sequence), rows, place)
        if opened.ports:
            index_N = rows.index(left=True) if rows.mask(left=True) is not None else None
            ticket, asked = self._ticket(opened, rows, 1, asked, work)
            with self._device(ticket, work), self._asking(opened, index_N, asked, False), timed(work, "forward_s"):
                output_KD, _ = opened.span.decode(hidden_ND, rows, state)
                opened.span.settle()
        else:
            output_KD = self._run_among_others(opened, Request(opened.span, hidden_ND, rows, state, work))
        state.made_by.append((microbatch, state.width))
        self._hold(opened, place.sequence, state)
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest, context=state.width)
        work.forward_flops += opened.parked_flops(rows, asked)
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
        self._caches.release(session, sequences)

    def load(self) -> Load:
        """See `Engine`."""
        return Load(
            waiting=self._turns.waiting,
            weight_bytes=self._resident,
            held_bytes=self._held_bytes(),
            budget_bytes=self._budget,
            peak_bytes=self._peak,
            batches=dict(self._batches),
        )

    def stop(self) -> None:
        """See `Engine`."""

    def _forward_unkept(self, opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work) -> Answer:
        output_KD = self._run_among_others(opened, Request(opened.span, hidden_ND, rows, work=work))
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest)
        return Answer(output_KD, work)

    def _run_among_others(self, opened: OpenSession, request: Request) -> torch.Tensor:
        """A request's output [K, D]: computed with those that wait and fit, or along with another whose turn it is."""
        joins = request.span.joins and not opened.opening.alone and self._joined_rows > 1
        cost = cost_of(request.positions, 1)
        ticket = Ticket(opened.opening.tenant, opened.name, cost, request if joins else None)
        with self._turns.turn(ticket) as ours:
            if ours and not (joins and self._ran_with_others(request)):
                self._batches[1] += 1
                with self._telling_of_memory():
                    request.run()
        return request.output_KD

    def _ran_with_others(self, request: Request) -> bool:
        """Whether it was run along with others; if that fails, each is to be run by itself."""
        batch = Batch(request, self._joined_rows)
        try:
            with self._turns.join(batch.take) as joined:
                if joined:
                    self._batches[1 + len(joined)] += 1
                    batch.run()
                return bool(joined)
        except FAILS:
            return False

    def _run(
        self, opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work, graph: bool, asked: Asked
    ) -> Kept:
        span = opened.span
        saved = SavedBytes(span.storages)
        index_N = rows.index() if rows.mask() is not None else None
        with (
            torch.set_grad_enabled(graph),
            self._asking(opened, index_N, asked, graph) as trips,
            timed(work, "forward_s"),
            saved.counting(),
        ):
            below = graph and (asked.input_gradient or trips is None)
            hidden_ND = hidden_ND.to(span.device, span.dtype).requires_grad_(below)
            output_ND = span.forward(hidden_ND, rows)
            span.settle()
        work.forward_flops += span.flops.forward.of(len(rows.lengths), rows.longest)
        work.forward_flops += opened.parked_flops(rows, asked)
        return Kept(hidden_ND, output_ND, rows, saved.total, trips)

    @contextmanager
    def _asking(
        self, opened: OpenSession, index_N: torch.Tensor | None, asked: Asked, graph: bool
    ) -> Iterator[RoundTrips | None]:
        """Add what the edge answers, and what it has parked, in here."""
        version, parked = opened.parked
        if asked.parked and asked.parked != version:
            raise NotKeptError("the parked adapters are gone; send them again")
        if asked.edge is None:
            yield None
            return
        held = parked if asked.parked else {}
        trips = RoundTrips(asked.sites, held, opened.span.linears, asked.edge, index_N, graph)
        try:
            with asking(trips):
                yield trips
        finally:
            trips.forget()

    def _forward_tapped(self, opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work) -> Answer:
        ticket, _ = self._ticket(opened, rows, 1, ASKED, work)
        with self._device(ticket, work), timed(work, "forward_s"):
            output_KD, taps_NW = opened.span.forward_tapped(hidden_ND, rows, opened.ports)
            opened.span.settle()
        positions = len(rows.lengths) * rows.longest
        projected = 2 * positions * hidden_ND.shape[1] * sum(port.width for port in opened.ports)
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest) + projected
        return Answer(output_KD, work, taps_NW=taps_NW)

    def _opened(self, session: str) -> OpenSession:
        try:
            return self._sessions[session]
        except KeyError:
            raise NotKeptError("the session was closed; open it again") from None

    def _keepers(self) -> int:
        """Sessions that have asked to keep a forward: those that only run forward, or decode, have no share."""
        return sum(session.keeps for session in list(self._sessions.values()))

    def _admit(self, opened: OpenSession) -> None:
        """See `ActivationStore.admit`."""
        with self._changing:
            if not opened.keeps:
                small = math.ceil(SMALL_GRAPH * self._bytes_per_position.get(opened.span.cut, 0.0))
                self._store.admit(self._keepers(), small)
                opened.keeps = True

    def _hold(self, opened: OpenSession, sequence: str, state: DecodeState) -> None:
        with self._changing:
            if self._is_open(opened):
                self._caches.put(opened.name, sequence, state)
        self._note_peak(0)

    def _is_open(self, opened: OpenSession) -> bool:
        """Whether it was not closed meanwhile: another of its name may be open, and must get nothing of it."""
        return self._sessions.get(opened.name) is opened

    def _expected(self, opened: OpenSession, rows: Rows, asked: Asked) -> int:
        """Bytes that a graph will hold, by the last one of this cut; 0 before there was any."""
        whole = self._bytes_per_position.get(opened.span.cut, 0.0) * len(rows.lengths) * rows.longest
        return math.ceil(whole * opened.depth(asked))

    def _keep(self, opened: OpenSession, microbatch: int, kept: Kept, asked: Asked) -> bool:
        rows = kept.rows
        if depth := opened.depth(asked):
            self._bytes_per_position[opened.span.cut] = kept.size / (len(rows.lengths) * rows.longest * depth)
        self._note_peak(kept.size)
        with self._changing:
            return self._is_open(opened) and self._store.keep(opened.name, microbatch, kept)

    def _differentiate(self, span: Span, kept: Kept, grad_KD: torch.Tensor, work: Work, asked: Asked) -> torch.Tensor:
        """The gradient of the input [N, D]; [0, D] where nothing below the span needs one."""
        grad_KD = grad_KD.to(kept.output_ND.device, kept.output_ND.dtype)
        inputs = [kept.hidden_ND] if kept.hidden_ND.requires_grad else []
        if kept.trips is not None and kept.trips.reached:
            if asked.edge is None:
                raise WireError("this backward belongs to a forward with ports; name them")
            kept.trips.edge = asked.edge
            inputs.append(kept.trips.anchor)
        if not inputs:
            return grad_KD[:0]
        # A backward that waits at a port must not hold the device's only autograd thread.
        with torch.autograd.set_multithreading_enabled(False), timed(work, "backward_s"):
            grad, *_ = torch.autograd.grad(kept.output_ND, inputs, grad_KD)
            span.settle()
        return grad if kept.hidden_ND.requires_grad else grad_KD[:0]

    def _ticket(
        self, opened: OpenSession, rows: Rows, passes: int, asked: Asked, work: Work
    ) -> tuple[Ticket[Request], Asked]:
        """A request's place in the queue, and what it asks with others using the device while it waits for the edge."""
        cost = cost_of(len(rows.lengths) * rows.longest, passes, opened.turns(asked))
        ticket: Ticket[Request] = Ticket(opened.opening.tenant, opened.name, cost)
        edge = None if asked.edge is None else PausingEdge(asked.edge, self._turns, ticket, work)
        return ticket, replace(asked, edge=edge)

    @contextmanager
    def _device(self, ticket: Ticket[Request], work: Work) -> Iterator[None]:
        asked = time.perf_counter()
        with self._turns.turn(ticket), self._telling_of_memory():
            work.queue_s += time.perf_counter() - asked
            self._batches[1] += 1
            yield

    @contextmanager
    def _telling_of_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise LimitError("the cloud's device is out of memory for this request; send smaller batches") from None

    def _note_peak(self, more: int) -> None:
        self._peak = max(self._peak, self._resident + self._held_bytes() + more)

    def _held_bytes(self) -> int:
        """Bytes of graphs, decode caches and parked adapters."""
        opened = list(self._sessions.values())
        parked = sum(adapter.nbytes for session in opened for adapter in session.parked[1].values())
        return self._store.held_bytes + self._caches.held_bytes + parked


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
