"""Runs with Kill-and-Revive against real servers, watched from within; and the command line, run in this process."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from edge_client.cli import main
from edge_client.link import Link
from edge_client.step import Stepper
from edge_client.taking_part import TakingPart
from isthmus.report.schema import RunReport
from tests.faults.training import run_here, settings
from tests.harness import Server

WARMUP, PERIOD, STEPS = 3, 4, 18
KILLING: Mapping[str, Any] = {
    "method": "dlora",
    "kr_active": 0.25,
    "kr_warmup": WARMUP,
    "kr_period": PERIOD,
    "steps": STEPS,
    "batch_size": 4,
}
QUERIES_AND_VALUES = tuple(f"{block}.self_attn.{module}" for block in range(1, 5) for module in ("q_proj", "v_proj"))
"""The ports of the tiny Llama at cut 1:1 with its usual targets, in the order of the report."""


@dataclass
class Watched:
    """What a run did, beside what it wrote: by step the alive and the active ports and each microbatch's tokens."""

    out: Path
    report: RunReport | None = None
    alive: list[frozenset[str]] = field(default_factory=list)
    active: list[frozenset[str]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    passes: Counter[int] = field(default_factory=Counter)  # requests sent, by `pb.Pass`

    @property
    def done(self) -> RunReport:
        """The report of a run that is over."""
        assert self.report is not None
        return self.report

    @property
    def decisions(self) -> list[tuple[int, tuple[str, ...]]]:
        """Steps and alive ports, from the report."""
        ports = self.done.ports
        assert ports is not None
        assert ports.kill_revive is not None
        names = [port.name for port in ports.ports]
        return [(made.step, tuple(names[index] for index in made.alive)) for made in ports.kill_revive.decisions]


def watch(seen: Watched, patch: pytest.MonkeyPatch) -> None:
    """Note what the next run does; the run itself is untouched."""
    begin, gradients, request = TakingPart.begin, Stepper.gradients, Link.request

    def noted_begin(self: TakingPart, step: int) -> dict[str, nn.Parameter]:
        wanted = begin(self, step)
        if self.policy is not None:
            seen.alive.append(self.policy.alive)
            seen.active.append(self.policy.active(step))
        return wanted

    def noted_gradients(self: Stepper, batches: Any, *rest: Any) -> Any:
        seen.tokens.append([batch.real_tokens for batch in batches])
        return gradients(self, batches, *rest)

    def noted_request(self: Link, call: Any, *rest: Any, **named: Any) -> Any:
        seen.passes[call.key.pass_kind] += 1
        return request(self, call, *rest, **named)

    patch.setattr(TakingPart, "begin", noted_begin)
    patch.setattr(Stepper, "gradients", noted_gradients)
    patch.setattr(Link, "request", noted_request)


def watched(server: Server, data: Path, out: Path, **changes: Any) -> Watched:
    """A whole run with Kill-and-Revive."""
    seen = Watched(out)
    with pytest.MonkeyPatch.context() as patch:
        watch(seen, patch)
        seen.report = run_here(settings(server, data, **{**KILLING, **changes}), out)
    return seen


@pytest.fixture(scope="session")
def killing_run(
    servers: dict[str, Server], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Watched]:
    """A run on the tiny Llama with these settings beside the usual ones; made once for each."""
    made: dict[str, Watched] = {}

    def run(**changes: Any) -> Watched:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = watched(servers["llama"], rows, tmp_path_factory.mktemp("killing") / "run", **changes)
        return made[key]

    return run


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: Any
    out: str
    err: str

    @property
    def one_line(self) -> bool:
        """Whether the command said one thing on standard error, progress apart."""
        lines = [line for line in self.err.splitlines() if line.startswith("edge_client: ")]
        return len(lines) == 1 and self.err.strip().endswith(lines[0].strip()) and "Traceback" not in self.err


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run an `edge_client` command by its entry point."""

    def run(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["edge_client", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Said(ended.value.code, said.out, said.err)

    return run
