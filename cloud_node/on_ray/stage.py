"""A part of the span in a process of its own: takes passes, asks at ports, answers with tensors.

Knows an engine of this process and what crosses; knows no Ray, no wire and no other stage.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from uuid import uuid4

import torch

from cloud_node.asks import ANSWER_WITHIN_S
from cloud_node.engine import Answer, Asked, EngineCard, Load, Opening
from cloud_node.in_process import InProcessEngine
from cloud_node.loading import load_spans
from cloud_node.on_ray.passes import Asking, Carried, LostSessionError, Outcome, Pass, Reply
from cloud_node.on_ray.plan import StagePlan
from isthmus.attached import Values
from isthmus.device import pick_device
from isthmus.errors import IsthmusError, LimitError, WireError
from isthmus.load import DTYPES, load_config
from isthmus.ports import LORA_VALUES
from isthmus.round_trips import Edge, Parked, Question

Result = tuple[Carried, Outcome]


class Stage:
    """Runs its part of the span, as often as it is asked to."""

    def __init__(self, plan: StagePlan) -> None:
        """Load the weights of its blocks, and no others."""
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)
        device = pick_device(plan.device)
        spans = load_spans(plan.model, list(plan.parts), DTYPES[plan.dtype], device, plan.quantize)
        width = load_config(plan.model).get_text_config().hidden_size
        self._engine = InProcessEngine(spans, str(device), width, plan.activation_budget)
        self._known: set[str] = set()
        self._edges: dict[str, _Edge] = {}

    def describe(self) -> EngineCard:
        """What it serves."""
        return self._engine.describe()

    def load(self) -> Load:
        """What it is busy with."""
        return self._engine.load()

    def pid(self) -> int:
        """Its process, which an operator may look at, and a test may end."""
        return os.getpid()

    def open(self, session: str, opening: Opening) -> None:
        """Begin a session; opening it again changes nothing."""
        self._engine.open(session, opening)
        self._known.add(session)

    def close(self, session: str) -> None:
        """Forget everything of a session."""
        self._known.discard(session)
        self._engine.close(session)

    def release(self, session: str, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """Forget kept activations and decode caches."""
        self._engine.release(session, microbatches, sequences)

    def run(self, one: Pass, *tensors: Carried) -> Result:
        """Run a pass that asks nobody.

        Raises:
            IsthmusError: see `Engine`.
            LostSessionError: the session must be opened here first.
        """
        return self._run(one, tensors, _Nobody() if one.waits else None)

    def run_asking(self, one: Pass, *tensors: Carried) -> Iterator[Asking | Outcome | Carried]:
        """Run a pass that asks the edge: its questions as they come, then the outcome, then the tensor."""
        edge = _Edge()
        self._edges[edge.name] = edge
        Thread(target=edge.carry, args=(lambda: self._run(one, tensors, edge),), daemon=True).start()
        try:
            while not isinstance(said := edge.said.get(), tuple):
                if isinstance(said, Exception):
                    raise said
                yield said
            tensor, outcome = said
            yield outcome
            yield tensor
        finally:
            del self._edges[edge.name]

    def answer(self, asker: str, reply: Reply) -> None:
        """Let a pass that asked go on, or end it; one that is gone is nobody's concern."""
        if edge := self._edges.get(asker):
            edge.heard.put(reply)

    def _run(self, one: Pass, tensors: Sequence[Carried], edge: Edge | None) -> Result:
        if one.session not in self._known:
            raise LostSessionError(one.session)
        answer = self._answer(one, [carried.tensor() for carried in tensors], edge)
        taps = None if answer.taps_NW is None else Carried.of(answer.taps_NW)
        found = tuple(map(Carried.of, answer.gradients))
        peak = self._engine.load().peak_bytes
        return Carried.of(answer.tensor_KD), Outcome(answer.work, answer.kept, taps, found, peak)

    def _answer(self, one: Pass, tensors: list[torch.Tensor], edge: Edge | None) -> Answer:
        asked = Asked(one.sites, edge, one.parked, one.input_gradient)
        if one.kind == "attach":
            pairs = {site: (down.tensor(), up.tensor()) for site, (down, up) in one.adapters.items()}
            values = {site: Values(LORA_VALUES, pair) for site, pair in pairs.items()}
            return self._engine.attach(one.session, one.microbatch, values)
        if one.kind == "gradients":
            return self._engine.gradients(one.session, one.parked, one.parts)
        if one.kind == "park":
            adapters = {site: Parked(down.tensor(), up.tensor()) for site, (down, up) in one.adapters.items()}
            return self._engine.park(one.session, one.microbatch, adapters)
        if one.kind == "backward":
            again = (tensors[1], one.rows) if one.again and one.rows is not None else None
            return self._engine.backward(one.session, one.microbatch, tensors[0], again, asked)
        if one.rows is None:
            raise WireError("a forward or decode without rows")
        if one.place is not None:
            return self._engine.decode(one.session, one.microbatch, tensors[0], one.rows, one.place, asked)
        return self._engine.forward(one.session, one.microbatch, tensors[0], one.rows, one.keep, asked)


class _Nobody:
    """The edge of a pass that has no port in this stage."""

    def ask(self, question: Question) -> list[torch.Tensor]:
        """See `isthmus.round_trips.Edge`."""
        raise WireError(f"block {question.block} asked at a port that was not named")


class _Edge:
    """The way to the edge from a pass that runs in a thread of its own; see `isthmus.round_trips.Edge`."""

    def __init__(self) -> None:
        self.name = uuid4().hex
        self.said: SimpleQueue[Asking | Result | Exception] = SimpleQueue()
        self.heard: SimpleQueue[Reply] = SimpleQueue()

    def carry(self, run: Callable[[], Result]) -> None:
        """Run a pass, and say what came of it."""
        try:
            self.said.put(run())
        except Exception as error:  # noqa: BLE001 (it is raised where the pass was asked for)
            self.said.put(error)

    def ask(self, question: Question) -> list[torch.Tensor]:
        """Ask, and wait.

        Raises:
            IsthmusError: the edge did not answer, or the front end is gone.
        """
        self.said.put(Asking.of(self.name, question))
        try:
            reply = self.heard.get(timeout=2 * ANSWER_WITHIN_S)  # the front end ends it sooner, while there is one
        except Empty:
            raise LimitError(f"nobody answered at a port of block {question.block}") from None
        if isinstance(reply, IsthmusError):
            raise reply
        return [carried.tensor() for carried in reply]
