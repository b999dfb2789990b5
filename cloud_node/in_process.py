"""The engine that runs spans in this process, on one device: tenants take turns, and small requests join in one.

Knows sessions by name, and what they hold within a budget; knows no wire, and of computing only who does it.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from threading import Lock

import torch

from cloud_node import passes
from cloud_node.activations import ROOM_WITHIN_S, ActivationStore, GraphSizes, Kept
from cloud_node.batching import ROWS, Request
from cloud_node.caches import DecodeCaches
from cloud_node.device import Device
from cloud_node.engine import ASKED, Answer, Asked, EngineCard, Load, Opening, Place, Work
from cloud_node.factors import LEAST_BYTES, SHARE, Factors
from cloud_node.opened import OpenSession
from cloud_node.span import DecodeState, Span
from cloud_node.turns import Turns
from isthmus.attached import Attached, Values
from isthmus.cut import Cut
from isthmus.errors import LimitError, NotKeptError, WireError
from isthmus.linears import Site
from isthmus.round_trips import Parked
from isthmus.rows import Rows

PARKED_BYTES = 1 << 26
"""Of a session's parked adapters, whatever its share of the activation budget."""

CACHES_SHARE = 2
"""Where sessions train, decode caches may take the budget divided by this; graphs have what they leave."""


class InProcessEngine:
    """Runs spans in this process, on one device, which one request has at a time, or several that are joined."""

    def __init__(
        self, spans: Mapping[Cut, Span], device: str, hidden_size: int, activation_budget: int, joined_rows: int = ROWS
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
        self._caches = DecodeCaches(lambda: activation_budget // (CACHES_SHARE if self._keepers() else 1))
        self._store = ActivationStore(activation_budget, self._keepers, lambda: self._caches.held_bytes)
        self._sizes = GraphSizes()
        self._factors = Factors(max(LEAST_BYTES, activation_budget // SHARE))
        self._turns: Turns[Request] = Turns()
        self._device = Device(self._turns, joined_rows)
        self._changing = Lock()  # held while sessions come, go, or are left something
        weights = {address: size for span in self._spans.values() for address, size in span.storages.items()}
        self._resident = sum(weights.values())
        self._peak: int = self._resident
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
        size = self._sizes.expected(opened.span.cut, rows, opened.depth(asked)) if keep else 0
        keep = keep and self._store.begin(session, size, patience_s=ROOM_WITHIN_S)
        try:
            # Before any graph was measured one runs at a time: passes that wait at ports hold theirs together.
            with (
                opened.unmeasured if keep and not size else nullcontext(),
                self._device.turn(opened, rows, 1, asked, work) as asking,
            ):
                kept = passes.forward(opened, hidden_ND, rows, work, keep, asking)
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
        if kept is not None and opened.valued and kept.attached is not opened.attached_for(asked):
            kept = None  # it was computed with other values
        if kept is not None:
            rows, times, size = kept.rows, 2, kept.size
        elif again is not None:
            rows, times, size = again[1], 3, 0
        else:
            raise NotKeptError(f"activations of microbatch {microbatch} are gone; send its input again")
        self._store.begin(session, size, must=True)
        try:
            # A forward that runs again had no room before: one at a time.
            with (
                opened.unmeasured if kept is None else nullcontext(),
                self._device.turn(opened, rows, times, asked, work) as asking,
            ):
                if kept is None and again is not None:
                    kept = passes.forward(opened, *again, work, True, asking)
                    work.recompute_flops = work.forward_flops
                if kept is None or grad_KD.shape != kept.output_ND.shape:
                    raise WireError(f"a gradient of shape {tuple(grad_KD.shape)} is not that of the forward's output")
                grad_ND = passes.backward(opened, microbatch, kept, grad_KD, work, asking)
        finally:
            self._store.end(session, size)
        work.backward_flops = opened.backward_flops(kept.rows, asked)
        return Answer(grad_ND, work)

    def decode(
        self, session: str, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, place: Place, asked: Asked = ASKED
    ) -> Answer:
        """See `Engine`."""
        opened, work = self._opened(session), Work()
        state = self._caches.resume(session, rows, place)
        if opened.ports:
            with self._device.turn(opened, rows, 1, asked, work) as asking:
                output_KD = passes.decode(opened, hidden_ND, rows, state, work, asking)
        else:
            output_KD = self._device.run(opened, Request(opened.span, hidden_ND, rows, state, work))
        state.made_by.append((microbatch, state.width))
        self._hold(opened, place.sequence, state)
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest, context=state.width)
        work.forward_flops += opened.beside_flops(rows, asked)
        return Answer(output_KD, work)

    def park(self, session: str, microbatch: int, adapters: Mapping[Site, Parked]) -> Answer:
        """See `Engine`."""
        opened = self._opened(session)
        held = opened.fitted(adapters)
        most = max(PARKED_BYTES, self._store.share())
        if sum(adapter.nbytes for adapter in held.values()) > most:
            raise LimitError(f"parked adapters of more than {most} bytes; park fewer, or smaller ones")
        opened.parked = (microbatch, held)
        self._note_peak(0)
        return Answer(torch.empty(0, 0), Work())

    def attach(self, session: str, microbatch: int, values: Mapping[Site, Values]) -> Answer:
        """See `Engine`."""
        opened = self._opened(session)
        if 2 * sum(one.nbytes for one in values.values()) > max(PARKED_BYTES, self._store.share()):
            raise LimitError("an adapter's values of more than this server holds for a session; train fewer modules")
        held = Attached.of(microbatch, values, opened.span.linears, opened.span.device)
        with self._changing:
            if self._is_open(opened):
                opened.attached = held
        self._note_peak(0)
        return Answer(torch.empty(0, 0), Work())

    def gradients(self, session: str, values: int, parts: Sequence[int]) -> Answer:
        """See `Engine`."""
        opened = self._opened(session)
        held = opened.attached_for(Asked(parked=values))
        if held is None:
            raise WireError("gradients are of values; name the request that sent them")
        summed = held.summed(parts) if parts else []
        self._note_peak(0)
        with self._changing:
            if opened.attached is held:
                opened.attached = None
            self._store.forget(session)  # passes with these values that no backward followed
        return Answer(torch.empty(0, 0), Work(), gradients=summed)

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
            batches=dict(self._device.batches),
        )

    def stop(self) -> None:
        """See `Engine`."""

    def _forward_unkept(self, opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work) -> Answer:
        output_KD = self._device.run(opened, Request(opened.span, hidden_ND, rows, work=work))
        work.forward_flops = opened.span.flops.forward.of(len(rows.lengths), rows.longest)
        return Answer(output_KD, work)

    def _forward_tapped(self, opened: OpenSession, hidden_ND: torch.Tensor, rows: Rows, work: Work) -> Answer:
        with self._device.turn(opened, rows, 1, ASKED, work):
            output_KD, taps_NW = passes.forward_tapped(opened, hidden_ND, rows, work)
        return Answer(output_KD, work, taps_NW=taps_NW)

    def _opened(self, session: str) -> OpenSession:
        try:
            opened = self._sessions[session]
        except KeyError:
            raise NotKeptError("the session was closed; open it again") from None
        if opened.cored and opened.frozen is None:
            opened.frozen = self._factors.of(opened.span, opened.ports)
        return opened

    def _keepers(self) -> int:
        """Sessions that have asked to keep a forward: those that only run forward, or decode, have no share."""
        return sum(session.keeps for session in list(self._sessions.values()))

    def _admit(self, opened: OpenSession) -> None:
        """See `ActivationStore.admit`."""
        with self._changing:
            if not opened.keeps:
                self._store.admit(self._keepers(), self._sizes.small(opened.span.cut))
                opened.keeps = True

    def _hold(self, opened: OpenSession, sequence: str, state: DecodeState) -> None:
        with self._changing:
            if self._is_open(opened):
                self._caches.put(opened.name, sequence, state)
        self._note_peak(0)

    def _is_open(self, opened: OpenSession) -> bool:
        """Whether it was not closed meanwhile: another of its name may be open, and must get nothing of it."""
        return self._sessions.get(opened.name) is opened

    def _keep(self, opened: OpenSession, microbatch: int, kept: Kept, asked: Asked) -> bool:
        self._sizes.note(opened.span.cut, kept, opened.depth(asked))
        self._note_peak(kept.size)
        with self._changing:
            return self._is_open(opened) and self._store.keep(opened.name, microbatch, kept)

    def _note_peak(self, more: int) -> None:
        self._peak = max(self._peak, self._resident + self._held_bytes() + more)

    def _held_bytes(self) -> int:
        """Bytes of graphs, decode caches, parked adapters and factors around cores."""
        parked = sum(session.parked_bytes for session in list(self._sessions.values()))
        return self._store.held_bytes + self._caches.held_bytes + parked + self._factors.nbytes
