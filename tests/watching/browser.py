"""A headless Chromium, driven over a pipe by the DevTools protocol: the page as a person's browser shows it."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.training import wait_until

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
COMMANDS_FD, ANSWERS_FD = 3, 4  # where Chromium reads and writes with --remote-debugging-pipe


class Browser:
    """One tab. Errors that pages log, requests they make and policies they break are kept in `complaints`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = os.fdopen(answers, "rb")
        self._numbers = itertools.count(1)
        self._tab: str | None = None
        self._left = b""
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command and wait for its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._tab is not None:
            message["sessionId"] = self._tab
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(answer["params"]))

    def _next(self) -> Any:
        while b"\0" not in self._left:
            read = self._answers.read1(1 << 16)  # type: ignore[attr-defined]
            assert read, "Chromium ended"
            self._left += read
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a page on a screen of this size; as a phone does, where it is narrow."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.getElementById('state') !== null")

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, identifier: str) -> str:
        """What stands in the element of this id."""
        return str(self.read(f"document.getElementById({identifier!r}).innerText"))

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        wait_until(lambda: bool(self.read(expression)), expression)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; a test that needs it fails where there is none."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "these tests look at the status page in Chromium: apt-get install chromium"
    commands, answers = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [chromium, *QUIET, f"--user-data-dir={profile}"],
        stderr=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=_at(commands[0], answers[1]),
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Browser(commands[1], answers[0])
    finally:
        process.terminate()
        process.wait(20)
        os.close(commands[1])


def _at(commands: int, answers: int) -> Callable[[], None]:
    def place() -> None:
        for given, wanted in ((commands, COMMANDS_FD), (answers, ANSWERS_FD)):
            os.dup2(given, wanted)

    return place
