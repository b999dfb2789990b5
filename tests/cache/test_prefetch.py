"""`edge_client prefetch` fetches every row of a run once, shows it, stops cleanly, and goes on where it was."""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_client.cached import Output, Outputs, Row
from edge_client.cli import main
from edge_client.config import TrainConfig
from isthmus.errors import InterruptedRunError
from tests.cache.training import METHODS, client, entries, fetched, kept, run_kept
from tests.faults.training import WITHIN_S, as_flags, command_here, is_one_line, wait_until
from tests.harness import Server, write_rows

Prefetch = Callable[..., tuple[dict[str, int], str]]

NOT_ITS_OWN = {"train", "peft", "rank", "alpha", "steps", "batch_size", "lr", "checkpoint_every"}
"""Settings of a run that no prefetch needs."""


def flags_of(config: TrainConfig) -> list[str]:
    """The settings of a run that its prefetch has too."""
    given = config.model_dump(exclude_unset=True)
    its_own = {name: value for name, value in given.items() if value is not False and name not in NOT_ITS_OWN}
    return as_flags(TrainConfig.model_construct(**its_own))


@pytest.fixture
def prefetch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path) -> Prefetch:
    """Run the command by its entry point; what it printed as JSON, and its standard error."""

    def go(config: TrainConfig) -> tuple[dict[str, int], str]:
        monkeypatch.setattr(sys, "argv", ["edge_client", "prefetch", *flags_of(config), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, error = capsys.readouterr()
        assert ended.value.code == 0, error
        return json.loads(out), error

    return go


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("many") / "rows.jsonl", count=400)


@pytest.mark.parametrize(
    ("method", "family", "changes"),
    [
        ("top", "llama", {}),
        ("top", "gpt2", {"deterministic": False, "codec": "bf16"}),
        ("top", "llama", {"cut": "0:2", "max_length": 8}),
        ("side", "llama", {"codec_port": "int8"}),
        ("side", "gpt2", {"cut": "2:0", "deterministic": False, "tap_every": 2}),
        ("side", "llama", {"cut": "0:0", "dtype": "bfloat16"}),
    ],
)
def test_everything_that_the_run_asks_for_is_there_after_a_prefetch_and_nothing_else(
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    prefetch: Prefetch,
    method: str,
    family: str,
    changes: dict[str, Any],
) -> None:
    done, _ = prefetch(kept(servers[family], rows, tmp_path / "cache", method, **changes))
    assert done["fetched"] == done["rows"] == len(entries(tmp_path / "cache"))
    report = run_kept(servers[family], rows, tmp_path / "cache", tmp_path / "run", method, **changes)
    assert fetched(report) == 0
    run_kept(servers[family], rows, tmp_path / "own", tmp_path / "alone", method, **changes)
    assert len(entries(tmp_path / "own")) == done["rows"]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_fetched_once_however_often_it_stands_in_the_data(
    servers: dict[str, Server], tmp_path: Path, prefetch: Prefetch, method: str
) -> None:
    line, other = ({"prompt": f"{word}:", "choices": [" no", " yes"], "answer": 1} for word in ("good", "bad"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (line, other, line, line)))
    once = tmp_path / "once.jsonl"
    once.write_text("".join(json.dumps(row) + "\n" for row in (line, other)))
    done, _ = prefetch(kept(servers["llama"], data, tmp_path / "cache", method))
    alone, _ = prefetch(kept(servers["llama"], once, tmp_path / "own", method))
    assert done["rows"] == done["fetched"] == alone["rows"]
    assert done["up_bytes"] == alone["up_bytes"] > 0


def test_a_second_prefetch_finds_everything_there_and_sends_nothing(
    servers: dict[str, Server], rows: Path, tmp_path: Path, prefetch: Prefetch
) -> None:
    config = kept(servers["llama"], rows, tmp_path / "cache", eval_data=None)
    done, said = prefetch(config)
    assert done.keys() == {"rows", "present", "fetched", "up_bytes", "down_bytes"}
    assert (done["present"], done["fetched"]) == (0, done["rows"])
    assert 0 < done["rows"] < len(rows.read_text().splitlines())
    assert min(done["up_bytes"], done["down_bytes"]) > 0
    assert "prefetch" in said
    again, _ = prefetch(config)
    assert again == {"rows": done["rows"], "present": done["rows"], "fetched": 0, "up_bytes": 0, "down_bytes": 0}


def test_rows_of_like_length_are_asked_for_together(
    servers: dict[str, Server], rows: Path, tmp_path: Path, prefetch: Prefetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    genuine = Outputs.of

    def noted(outputs: Outputs, wanted: Sequence[Row]) -> list[Output]:
        asked.append([len(row.ids) for row in wanted])
        return genuine(outputs, wanted)

    monkeypatch.setattr(Outputs, "of", noted)
    config = kept(servers["llama"], rows, tmp_path / "cache", deterministic=False, eval_batch_size=4)
    done, _ = prefetch(config)
    lengths = [length for batch in sorted(asked) for length in batch]
    assert lengths == sorted(lengths)
    assert len(lengths) == done["rows"]
    assert {len(batch) for batch in sorted(asked)[:-1]} == {4}


def test_too_little_room_is_said(servers: dict[str, Server], rows: Path, tmp_path: Path, prefetch: Prefetch) -> None:
    _, said = prefetch(kept(servers["llama"], rows, tmp_path / "cache", cache_limit=4000))
    assert "too small" in said
    assert "--cache-limit" in said
    assert sum(path.stat().st_size for path in entries(tmp_path / "cache")) <= 4000


@pytest.mark.parametrize("method", METHODS)
def test_a_runs_own_configuration_file_says_what_to_fetch(
    servers: dict[str, Server],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = kept(servers["llama"], rows, tmp_path / "cache", method)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    command = ("prefetch", "--config", file, "--data", rows, "--server", servers["llama"].address)
    code, said = command_here(monkeypatch, capsys, *command)
    assert code == 0, said
    assert fetched(run_kept(servers["llama"], rows, tmp_path / "cache", tmp_path / "run", method)) == 0


def test_ctrl_c_keeps_what_was_fetched_and_the_same_command_fetches_the_rest(
    servers: dict[str, Server], many: Path, tmp_path: Path, cache: Path, prefetch: Prefetch
) -> None:
    where = tmp_path / "cache"
    config = kept(servers["llama"], many, where, eval_data=None, eval_batch_size=1)
    with client(cache, "prefetch", *flags_of(config), "--json") as process:
        wait_until(lambda: process.poll() is not None or len(entries(where)) >= 5, "five rows")
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == InterruptedRunError.exit_code, said
    assert out == ""
    said = said[said.index("edge_client:") :]  # before it comes the progress
    assert is_one_line(said), said
    assert "same command goes on" in said
    there = len(entries(where))
    done, said = prefetch(config)
    assert (done["present"], done["fetched"]) == (there, done["rows"] - there)
    assert done["fetched"] > 0
    assert "prefetch" in said
    assert len(entries(where)) == done["rows"] < len(many.read_text().splitlines())
