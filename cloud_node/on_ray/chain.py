"""A session's passes through its stages, one after another.

Knows the order of stages and what each is asked; a tensor goes from stage to stage and is never fetched between them.
How a stage is reached is Ray's: what is called here is an actor's handle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import ray
import torch

from cloud_node.engine import Answer, Asked, Opening, Place, Work
from cloud_node.on_ray.parts import Leg
from cloud_node.on_ray.passes import Asking, Carried, Kind, Outcome, Pass, carried_adapters, carried_values
from isthmus.attached import Values
from isthmus.errors import IsthmusError
from isthmus.linears import Site
from isthmus.round_trips import Edge, Parked
from isthmus.rows import Rows


@dataclass
class _Run:
    """One leg's pass under way: where its tensor will be, and its outcome, if it is known already."""

    tensor: Any
    outcome: Any

    def result(self) -> Outcome:
        """Wait for it."""
        found: Outcome = self.outcome if isinstance(self.outcome, Outcome) else ray.get(self.outcome)
        return found


class Chain:
    """The stages that a session runs through; see `cloud_node.engine.Engine` for the passes.

    Attributes:
        stages: actors' handles, from the first that the session runs through to the last.
        peaks: the most bytes of tensors that each has said it held.

    Every method raises `ray.exceptions.RayError` where a stage is gone, or around what a stage raised.
    """

    def __init__(self, session: str, opening: Opening, legs: Sequence[Leg], stages: Sequence[Any]) -> None:
        """Run `session` through the `legs` of `stages`, which are actors' handles by number."""
        self.stages = [stages[leg.stage] for leg in legs]
        self.peaks = [0] * len(legs)
        self._session = session
        self._opening = opening
        self._legs = list(legs)

    def open(self) -> None:
        """Begin the session in every stage that does not know it."""
        calls = [stage.open.remote(self._session, leg.opening) for stage, leg in self._each()]
        ray.get(calls)

    def close(self) -> None:
        """Forget the session; waits for nobody."""
        for stage in self.stages:
            stage.close.remote(self._session)

    def release(self, microbatches: Sequence[int], sequences: Sequence[str]) -> None:
        """Forget what is named; waits for nobody."""
        for stage in self.stages:
            stage.release.remote(self._session, list(microbatches), list(sequences))

    def forward(self, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, keep: bool, asked: Asked) -> Answer:
        """Hidden states through every stage; kept in all, or released where they are."""
        one = self._pass("forward", microbatch, asked, keep=keep)
        try:
            runs = self._through(one, ray.put(Carried.of(hidden_ND)), rows, asked)
            outcomes = self._outcomes(runs)
        except Exception:
            if keep:  # the stages before the one that failed have kept theirs
                self.release([microbatch], [])
            raise
        kept = [outcome.kept for outcome, leg in zip(outcomes, self._legs, strict=True) if self._trains(leg, asked)]
        if any(kept) and not all(kept):
            self.release([microbatch], [])
        return self._answer(runs[-1], outcomes, kept=bool(kept) and all(kept))

    def decode(self, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, place: Place, asked: Asked) -> Answer:
        """Hidden states through every stage, after each one's cached past."""
        one = replace(self._pass("decode", microbatch, asked), place=place)
        runs = self._through(one, ray.put(Carried.of(hidden_ND)), rows, asked)
        return self._answer(runs[-1], self._outcomes(runs))

    def backward(
        self, microbatch: int, grad_KD: torch.Tensor, again: tuple[torch.Tensor, Rows] | None, asked: Asked
    ) -> Answer:
        """A gradient down through the stages.

        Where the input comes again, it first goes up without a graph, and each stage then runs its own part a second
        time, with one: what is held at any moment is one stage's graph (Chen et al., 2016, arXiv 1604.06174).
        """
        inputs: list[Any] = []
        outcomes: list[Outcome] = []
        if again is not None:
            inputs, outcomes = self._inputs(microbatch, *again, asked)
        gradient: Any = ray.put(Carried.of(grad_KD))
        for number in reversed(range(len(self._legs))):
            leg, last = self._legs[number], number == len(self._legs) - 1
            if not self._trains(leg, asked):
                break
            one = replace(self._at(leg, self._pass("backward", microbatch, asked), asked), again=again is not None)
            given = [gradient]
            if again is not None:
                one = replace(one, rows=again[1] if last else _whole(again[1]))
                given.append(inputs[number])
            run = self._start(number, one, given, asked.edge)
            outcomes.append(run.result())
            self.peaks[number] = outcomes[-1].peak_bytes
            gradient = run.tensor
        answer = Answer(_fetched(gradient), _together(outcomes))
        if again is not None:
            answer.work.recompute_flops = answer.work.forward_flops
        wanted = asked.input_gradient or not self._opening.ports
        return answer if wanted else replace(answer, tensor_KD=grad_KD[:0])

    def park(self, microbatch: int, adapters: Mapping[Site, Parked]) -> Answer:
        """Hold frozen adapters, each where its module is."""
        runs = []
        for number, leg in enumerate(self._legs):
            mine = {site: adapter for site, adapter in adapters.items() if site[0] in leg.blocks}
            one = Pass("park", self._session, microbatch, adapters=carried_adapters(mine))
            runs.append(self._start(number, one, [], None))
        return Answer(torch.empty(0, 0), _together([run.result() for run in runs]))

    def attach(self, microbatch: int, values: Mapping[Site, Values]) -> Answer:
        """Hold values for a step, each where its module is; a stage that has no port of the session notes the name."""
        runs = []
        for number, leg in enumerate(self._legs):
            mine = {site: one for site, one in values.items() if site[0] in leg.blocks}
            kind: Kind = "attach" if leg.opening.ports else "park"
            one = Pass(kind, self._session, microbatch, adapters=carried_values(mine))
            runs.append(self._start(number, one, [], None))
        return Answer(torch.empty(0, 0), _together([run.result() for run in runs]))

    def gradients(self, values: int, parts: Sequence[int]) -> Answer:
        """The gradients of the values that were attached, from each stage that has any, in the order of the blocks."""
        one = Pass("gradients", self._session, values, parked=values, parts=tuple(parts))
        numbers = [number for number, leg in enumerate(self._legs) if leg.opening.ports]
        outcomes = [run.result() for run in [self._start(number, one, [], None) for number in numbers]]
        found = [carried.tensor() for outcome in outcomes for carried in outcome.gradients]
        return Answer(torch.empty(0, 0), _together(outcomes), gradients=found)

    def _each(self) -> list[tuple[Any, Leg]]:
        return list(zip(self.stages, self._legs, strict=True))

    def _pass(self, kind: Kind, microbatch: int, asked: Asked, keep: bool = False) -> Pass:
        return Pass(kind, self._session, microbatch, keep=keep, waits=asked.edge is not None, parked=asked.parked)

    def _at(self, leg: Leg, one: Pass, asked: Asked) -> Pass:
        """What a pass is in one stage: its own sites, and a gradient if anything below wants one."""
        return replace(
            one,
            sites=leg.sites(asked.sites),
            input_gradient=self._wants_below(leg, asked),
            keep=one.keep and self._trains(leg, asked),
        )

    def _wants_below(self, leg: Leg, asked: Asked) -> bool:
        below = any(site[0] < leg.blocks.start for site in asked.sites)
        return asked.input_gradient or asked.edge is None or below

    def _trains(self, leg: Leg, asked: Asked) -> bool:
        """Whether a backward goes through a stage."""
        return self._wants_below(leg, asked) or bool(leg.sites(asked.sites))

    def _through(self, one: Pass, tensor: Any, rows: Rows, asked: Asked) -> list[_Run]:
        """Send a pass upwards; none waits for the one before, unless the edge must be asked in it."""
        runs = []
        for number, leg in enumerate(self._legs):
            last = number == len(self._legs) - 1
            mine = replace(self._at(leg, one, asked), rows=rows if last else _whole(rows))
            runs.append(self._start(number, mine, [tensor], asked.edge))
            tensor = runs[-1].tensor
        return runs

    def _inputs(
        self, microbatch: int, hidden_ND: torch.Tensor, rows: Rows, asked: Asked
    ) -> tuple[list[Any], list[Outcome]]:
        """What goes into each stage, without a graph; the last stage need not run for that."""
        inputs: list[Any] = [ray.put(Carried.of(hidden_ND))]
        outcomes = []
        for number, leg in enumerate(self._legs[:-1]):
            one = replace(self._at(leg, self._pass("forward", microbatch, asked), asked), rows=_whole(rows))
            run = self._start(number, one, [inputs[-1]], asked.edge)
            outcomes.append(run.result())
            inputs.append(run.tensor)
        return inputs, outcomes

    def _start(self, number: int, one: Pass, tensors: list[Any], edge: Edge | None) -> _Run:
        stage = self.stages[number]
        if edge is None or not one.sites:
            return _Run(*stage.run.remote(one, *tensors))
        said = stage.run_asking.remote(one, *tensors)
        for reference in said:
            asking = ray.get(reference)
            if isinstance(asking, Outcome):
                return _Run(next(said), asking)
            _answer_at(stage, asking, edge)
        raise IsthmusError("a stage ended a pass without an answer; send the request again")

    def _outcomes(self, runs: Sequence[_Run]) -> list[Outcome]:
        outcomes = [run.result() for run in runs]
        self.peaks = [outcome.peak_bytes for outcome in outcomes]
        return outcomes

    def _answer(self, last: _Run, outcomes: Sequence[Outcome], kept: bool = False) -> Answer:
        return Answer(_fetched(last.tensor), _together(outcomes), kept, self._taps(outcomes))

    def _taps(self, outcomes: Sequence[Outcome]) -> torch.Tensor | None:
        """The taps of all stages side by side, in the order of the session's ports."""
        columns: dict[Any, torch.Tensor] = {}
        for leg, outcome in zip(self._legs, outcomes, strict=True):
            if outcome.taps is not None:
                ports = leg.opening.ports
                parts = torch.split(outcome.taps.tensor(), [port.width for port in ports], dim=1)
                columns |= dict(zip(ports, parts, strict=True))
        return torch.cat([columns[port] for port in self._opening.ports], 1) if columns else None


def _answer_at(stage: Any, asking: Asking, edge: Edge) -> None:
    """Ask the edge for a stage; what goes wrong there ends the pass in the stage."""
    try:
        reply: Any = tuple(Carried.of(tensor) for tensor in edge.ask(asking.question()))
    except IsthmusError as error:
        reply = type(error)(*error.args)
    stage.answer.remote(asking.asker, reply)


def _whole(rows: Rows) -> Rows:
    """The same rows, every output of which is wanted: by the next stage."""
    return Rows(rows.lengths, rows.starts)


def _fetched(tensor: Any) -> torch.Tensor:
    found: Carried = ray.get(tensor)
    return found.tensor()


def _together(outcomes: Sequence[Outcome]) -> Work:
    """What all stages cost."""
    return Work(**{one.name: sum(getattr(outcome.work, one.name) for outcome in outcomes) for one in fields(Work)})
