"""The time left is what the pace so far says, however large the first piece was and wherever a resumed run began."""

import io
import time

import pytest
from rich.console import Console

from isthmus.training.progress import meter


@pytest.mark.parametrize(("start", "done"), [(0, 32), (28, 60)])
def test_the_time_left_goes_by_what_was_done_since_the_start(
    monkeypatch: pytest.MonkeyPatch, start: int, done: int
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said = io.StringIO()
    with meter(Console(file=said), "evaluate", done + 16, start) as progress:
        now[0] += 10
        progress.update(done)
    left = 10 * 16 / (done - start)
    assert said.getvalue().split()[-2:] == [f"0:{int(left):02d}", "left"]
