"""Event files hold what the run's own files hold, as TensorBoard reads them."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isthmus.errors import UsageError
from isthmus.report.event_files import export, folder_name
from isthmus.report.history import History
from tests.faults.training import command_here
from tests.report.by_hand import DOWN, UP, metrics, write_run
from tests.report.example import report


def read(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, value and time of each scalar."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(each.step, each.value, each.wall_time) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_scalar_is_there_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = write_run(tmp_path / "first", report(steps=7), 7), tmp_path / "events"
    outcome: Any = command_here(monkeypatch, capsys, "report", run, "--format", "tensorboard", "--out", out)
    assert outcome == (0, "")
    found = read(out / "first")
    assert found.keys() == {
        *("train/loss", "train/gradient_norm", "train/lr", "wire/up_bytes", "wire/down_bytes"),
        *("eval/loss", "eval/accuracy"),
    }
    lines = metrics(7)
    for tag, name in (("loss", "loss"), ("gradient_norm", "gradient_norm"), ("lr", "lr")):
        assert [value for _, value, _ in found[f"train/{tag}"]] == pytest.approx([line[name] for line in lines])
        assert [step for step, _, _ in found[f"train/{tag}"]] == list(range(1, 8))
    assert [value for _, value, _ in found["wire/up_bytes"]] == [
        sum(UP + 10 * each for each in range(step)) for step in range(1, 8)
    ]
    assert found["wire/down_bytes"][-1][1] == sum(DOWN + 10 * each for each in range(7))
    assert [(step, value) for step, value, _ in found["eval/accuracy"]] == [
        (0, pytest.approx(0.801)),
        (7, pytest.approx(0.874)),
    ]


def test_its_clock_is_the_runs(tmp_path: Path) -> None:
    run = report()
    assert run.started is not None
    place = write_run(tmp_path / "run", run, 3)
    export(tmp_path, {"out": run}, {"out": History.read(place)}, {})
    times = [time - run.started.timestamp() for _, _, time in read(tmp_path / "out")["train/loss"]]
    assert times == pytest.approx([line["seconds"] for line in metrics(3)], abs=1e-3)


def test_an_export_is_never_mixed_with_an_earlier_one(tmp_path: Path) -> None:
    export(tmp_path, {"run": report()}, {"run": History()}, {})
    with pytest.raises(UsageError, match="choose another --out"):
        export(tmp_path, {"run": report()}, {"run": History()}, {})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="choose another --out"):
        export(blocked, {"run": report()}, {"run": History()}, {})


@pytest.mark.parametrize("name", ["../../etc", "/etc/run", "..", "", "a\nb", "\x00"])
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    assert Path(folder_name(name)).parts == (folder_name(name),)
    assert folder_name(name) not in ("", ".", "..")
