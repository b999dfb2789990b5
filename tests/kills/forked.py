"""Commands as processes that may be killed, each forked from a warm one, and what they said.

Knows processes, their ends and their output; knows nothing of what they compute.
"""

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import kill
from pathlib import Path
from tempfile import TemporaryDirectory

from isthmus.faults import VARIABLE, Fault
from tests.faults.training import wait_until
from tests.harness import ENVIRONMENT

WITHIN_S = 120.0
KILLED = -signal.SIGKILL


@dataclass
class Forked:
    """A command that runs; `code` is there once it has ended."""

    pid: int
    output: Path
    ended: threading.Event = field(default_factory=threading.Event)
    code: int | None = None

    def wait(self, within_s: float = WITHIN_S) -> int:
        """Its exit code; negative: the signal that killed it."""
        assert self.ended.wait(within_s), f"it does not end:\n{self.said}"
        assert self.code is not None
        return self.code

    @property
    def said(self) -> str:
        """All its output so far."""
        return self.output.read_text() if self.output.exists() else ""

    @property
    def address(self) -> str:
        """Where a server is ready, or was before it ended; waits for it."""
        wait_until(lambda: self.ended.is_set() or "ready on " in self.said, "a server to be ready")
        assert "ready on " in self.said, self.said
        return self.said.partition("ready on ")[2].split()[0]

    def signal(self, signum: int) -> None:
        """Send it a signal, if it still runs."""
        if not self.ended.is_set():
            kill(self.pid, signum)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It stands still in here."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a power cut would; waits until it is gone."""
        self.signal(signal.SIGKILL)
        self.ended.wait(WITHIN_S)


class Forker:
    """Starts commands from a zygote."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._began: queue.SimpleQueue[Forked | None] = queue.SimpleQueue()
        self._running: dict[int, Forked] = {}
        self._asking = threading.Lock()
        self._outputs: list[Path] = []
        threading.Thread(target=self._read, daemon=True).start()
        assert self._began.get(timeout=WITHIN_S) is None

    def start(self, *arguments: str | Path, fault: str | Fault = "", user: int | None = None, **more: str) -> Forked:
        """Start `python -m ARGUMENTS`, armed with a fault; `more` are variables of its environment."""
        output = self._folder / str(len(self._outputs))
        environment = {**more, VARIABLE: str(fault)}
        asked = {"arguments": [*map(str, arguments)], "environment": environment, "output": str(output)}
        if user is not None:
            asked["user"] = user
            output.touch()
        with self._asking:
            self._outputs.append(output)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            began = self._began.get(timeout=WITHIN_S)
        assert began is not None
        return began

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "ready" in told:
                self._began.put(None)
            elif "began" in told:
                self._running[told["began"]] = Forked(told["began"], self._outputs[-1])
                self._began.put(self._running[told["began"]])
            else:
                ended = self._running.pop(told["ended"])
                ended.code = told["code"]
                ended.ended.set()


@contextmanager
def forker() -> Iterator[Forker]:
    """A forker while in here; what it started is gone afterwards."""
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.kills.zygote"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield Forker(process, Path(folder))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(WITHIN_S)
