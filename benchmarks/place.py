"""Where benchmarks work: the model, the data, certificates, and processes that serve.

Knows folders and processes; measures nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT
from cloud_node.models import fetch
from demo.reviews import prepare
from isthmus.command import cache_directory
from isthmus.trust import certificates

MODEL = "smollm2-135m"
CUT = "2:2"
ROWS, TOKENS = 8, 128
READY = "ready on "


@dataclass(frozen=True)
class Place:
    """A working folder, how many threads each process computes with, and how often a measurement is repeated.

    `variables` are those of the environment that its processes have beside this one's.
    """

    directory: Path
    given_model: Path | None
    threads: int
    repeats: int
    variables: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> Path:
        """The model's directory, fetched at first."""
        return self.given_model or fetch(MODEL, cache_directory() / "benchmarks" / MODEL)

    @cached_property
    def reviews(self) -> Path:
        """Movie reviews to train on, fetched at first."""
        return prepare(cache_directory() / "benchmarks" / "reviews", "movies", held_out=1000)[0]

    @cached_property
    def server_certs(self) -> Path:
        """The server's identity, under an authority made for this run."""
        certificates.init_authority(self.directory / "certs")
        return self.directory / "certs" / "server"

    @cached_property
    def edge_certs(self) -> Path:
        """An edge's identity under the same authority."""
        return certificates.issue(self.server_certs.parent, "edge")

    @contextmanager
    def node(self, dtype: str, cut: str = CUT) -> Iterator[str]:
        """A `cloud_node serve` process that offers `cut` while in here; gives its address."""
        command = ["cloud_node", "serve", "--model", self.model, "--cut", cut, "--listen", "127.0.0.1:0"]
        flags = ["--certs", self.server_certs, "--dtype", dtype, "--threads", self.threads]
        with self.process(*command, *flags) as address:
            yield address

    @contextmanager
    def training(self, flags: Sequence[object], dtype: str, cut: str | None) -> Iterator[list[object]]:
        """An `edge_client train` with `flags`, while a node offers `cut` to it in here; None: with the whole model."""
        with ExitStack() as stack:
            where: list[object] = ["--model", self.model]
            if cut is not None:
                where = ["--server", stack.enter_context(self.node(dtype, cut)), "--certs", self.edge_certs]
            yield ["edge_client", "train", *flags, *where, "--dtype", dtype, "--threads", self.threads]

    @contextmanager
    def process(self, *arguments: object) -> Iterator[str]:
        """`python -m ARGUMENTS` while in here; gives what its line `... ready on HOST:PORT` says."""
        log = self.directory / f"{arguments[0]}.log"
        with log.open("a") as errors:
            running = subprocess.Popen(
                [sys.executable, "-m", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment(),
                cwd=ROOT,
            )
            try:
                yield _address(running, log)
            finally:
                running.terminate()
                running.wait(30)

    def run(self, *arguments: object) -> str:
        """`python -m ARGUMENTS` to its end; gives what it printed.

        Raises:
            RuntimeError: it failed.
        """
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment(), cwd=ROOT, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    def run_json(self, *arguments: object) -> Any:
        """As `run`; gives its last line, read as JSON."""
        return json.loads(self.run(*arguments).splitlines()[-1])

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **self.variables}


def _address(running: "subprocess.Popen[str]", log: Path) -> str:
    if running.stdout is not None:
        for line in running.stdout:
            if READY in line:
                return line.rpartition(READY)[2].strip()
    raise RuntimeError(f"a process ended before it was ready; {log} says:\n{log.read_text()[-2000:]}")
