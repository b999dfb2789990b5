"""Rounds of a run: every so many steps what changed is averaged with other edges', and training goes on from there.

Knows a run's trainable values as float32 tensors by name, whatever they are, and when a round is due; the round itself
is in `round_edge`. Moments of the optimizer are never sent, and stay.
"""

import time
from typing import Any, Final

import torch
from rich.console import Console

from edge_client.config import TrainConfig
from edge_client.edge_model import EdgeModel
from edge_client.round_calls import RoundCalls
from edge_client.round_edge import EdgeInRound
from isthmus import PROTOCOL
from isthmus.errors import BundleError, LimitError, UsageError
from isthmus.ledger.record import Ledger
from isthmus.rounds.quantised import MOST_VALUES, clipped_share, layout_of
from isthmus.training.optimizer import Optimizer
from isthmus.trust.credentials import Credentials
from isthmus.wire.gen import backbone_pb2 as pb

BEGAN: Final = "round/"
"""How a checkpoint's names begin of the values that the present round began with."""


class Rounds:
    """A run's part in the rounds of one name."""

    def __init__(
        self, config: TrainConfig, edge: EdgeModel, optimizer: Optimizer, ledger: Ledger, console: Console
    ) -> None:
        """Average what `optimizer` trains, as `config` says.

        Raises:
            UsageError: no node, certificate or name of a round is told.
            LimitError: more values train than a round takes.
        """
        if config.server is None or config.certs is None or config.join is None:
            raise UsageError("--join needs --server and --certs: what is sent is signed")
        self._config, self._optimizer, self._console = config, optimizer, console
        self._credentials = Credentials.load(config.certs)
        self._calls = RoundCalls(config.server, self._credentials, ledger, config.patience)
        self._began = optimizer.values()
        self._done = 0
        self._run: str | None = None
        values = sum(value.numel() for value in self._began.values())
        if values > MOST_VALUES:
            raise LimitError(f"{values:,} values train, and a round takes {MOST_VALUES:,}: lower --rank or --targets")
        self._terms = pb.RoundTerms(
            protocol=PROTOCOL,
            name=config.join,
            model_digest=edge.digest or "",
            layout=layout_of(self._began),
            values=values,
            clip=config.clip,
            every=config.round_every,
        )

    def begin(self) -> None:
        """Take the present values for those that the first round begins with."""
        self._began = self._optimizer.values()

    def due(self, step: int) -> bool:
        """Whether a round must be carried out after so many steps."""
        return step // self._config.round_every > self._done

    def carry_out(self) -> None:
        """Average with the others, and go on from there; progress is shown in a line.

        Raises:
            IsthmusError: as `EdgeInRound.carry_out`; the checkpoint before it is of this very state.
        """
        began, number, now = time.perf_counter(), self._done + 1, self._optimizer.values()
        difference = {name: now[name] - self._began[name] for name in now}
        self._console.print(f"round {number} of {self._config.join}: waiting for the others", highlight=False)
        part = EdgeInRound(
            *(self._calls, self._credentials, self._terms, number, self._began, difference),
            cohort=self._config.cohort,
            run=self._run,
        )
        found = part.carry_out(self._config.round_patience)
        self._began = {name: self._began[name] + found.values[name] for name in now}
        self._optimizer.set_values(self._began)
        self._done, self._run = number, found.run
        self._console.print(self._said(number, found.edges, found.counted, difference, began), highlight=False)

    def state(self) -> dict[str, torch.Tensor]:
        """What the present round began with, for a checkpoint."""
        return {f"{BEGAN}{name}": value.clone() for name, value in self._began.items()}

    def facts(self) -> dict[str, Any]:
        """How many rounds are done, and of which run they are, as JSON."""
        return {"done": self._done, "run": self._run}

    def load(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Go on from a `state` and `facts`.

        Raises:
            BundleError: they are of other values.
        """
        found = {name.removeprefix(BEGAN): value for name, value in tensors.items() if name.startswith(BEGAN)}
        if layout_of(found) != self._terms.layout:
            raise BundleError("the checkpoint's round is of another adapter; resume with the run's own settings")
        self._began, self._done, self._run = found, facts["done"], facts["run"]

    def _said(self, number: int, edges: int, counted: bool, difference: dict[str, torch.Tensor], began: float) -> str:
        told = f"round {number} of {self._config.join}: the average of {edges} edges"
        told += "" if counted else ", this one left out"
        share = clipped_share(difference, self._config.clip)
        told += f", {share:.1%} of values clipped" if share else ""
        return f"{told} ({time.perf_counter() - began:.1f} s)"
