"""Results of benchmarks as JSON Lines, each with the commit, the machine and the day it was measured on.

Knows rows and files; measures nothing. The last row of a name is the one that counts; earlier ones are history.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
PAGE = ROOT / "docs" / "benchmarks.md"

MEASURED = (
    *("isthmus", "cloud_node", "edge_client", "emulator", "demo", "benchmarks"),
    ":(exclude)benchmarks/results.jsonl",
)
"""What a figure depends on: a commit that leaves these alone leaves the results valid."""


@dataclass(frozen=True)
class Figure:
    """A measured value: the median of its repeats, and the least and greatest of them where there were several."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> "Figure":
        """The median and the spread of repeats."""
        return cls(statistics.median(values), unit, min(values), max(values))

    @property
    def bare(self) -> str:
        """Without its unit, for a column that names it."""
        spread = "" if self.low is None or self.high is None else f" ({_short(self.low)} to {_short(self.high)})"
        return f"{_short(self.value)}{spread}"

    def __str__(self) -> str:
        return f"{self.bare} {self.unit}".strip()


@dataclass(frozen=True)
class Target:
    """What a figure should reach, whether it did, and why not."""

    text: str
    reached: str
    met: bool
    reason: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found: figures by a name that can be read, and targets."""

    figures: dict[str, Figure]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Machine:
    """Where it ran."""

    cpu: str
    cores: int
    memory_gib: float
    versions: str

    @classmethod
    def here(cls) -> "Machine":
        """This one."""
        names = ("torch", "grpcio", "transformers", "peft")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return cls(_cpu(), _cores(), round(memory, 1), f"Python {platform.python_version()}, {versions}")

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB"


@dataclass(frozen=True)
class Row:
    """One benchmark, once measured."""

    name: str
    outcome: Outcome
    command: str
    commit: str
    machine: Machine
    date: str
    repeats: int

    @classmethod
    def of_today(cls, name: str, outcome: Outcome, command: str, commit: str, repeats: int) -> "Row":
        """What was measured here and now."""
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        return cls(name, outcome, command, commit, Machine.here(), date, repeats)

    def append(self) -> None:
        """Add it to the results."""
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def latest() -> dict[str, Row]:
    """The last row of each name."""
    if not RESULTS.exists():
        return {}
    rows = [_row(json.loads(line)) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row.name: row for row in rows}


def commit() -> tuple[str, bool]:
    """The last commit that touched what is measured, and whether nothing has changed since.

    Without a repository the commit is `unknown`, and nothing says that it has not changed.
    """
    head = _git("log", "-1", "--format=%h", "--", *MEASURED)
    if not head:
        return "unknown", False
    changed = _git("status", "--porcelain", "--", *MEASURED)
    return (f"{head} with changes", False) if changed else (head, True)


def _git(*arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    done = subprocess.run([git, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _row(raw: dict) -> Row:  # type: ignore[type-arg]
    outcome = raw.pop("outcome")
    figures = {name: Figure(**figure) for name, figure in outcome["figures"].items()}
    targets = tuple(Target(**target) for target in outcome["targets"])
    return Row(outcome=Outcome(figures, targets), machine=Machine(**raw.pop("machine")), **raw)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _short(value: float) -> str:
    """Three significant digits, and every digit of whole numbers of up to nine."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
