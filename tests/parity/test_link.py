"""A run over a slowed line computes the same bits, sends the same tensors, and waits as long as the line takes."""

import json
from pathlib import Path

from tests.harness import run_command, serving, write_rows


def test_a_slowed_line_changes_nothing_but_the_time(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    rows, round_trip_s, steps = write_rows(tmp_path / "rows.jsonl"), 0.1, 3
    reports = {}
    with serving(tiny_models["llama"], "--cut", "1:1", cache=tmp_path / "cloud") as server:
        for name, slow in {"as-it-is": [], "slow": ["--link", f"{1000 * round_trip_s:.0f}:100:100"]}.items():
            run = ["--method", "split", "--server", server.address, "--data", rows, "--out", tmp_path / name]
            done = run_command(
                *("edge_client", "train", *run, "--steps", str(steps), "--threads", "1", "--deterministic", *slow),
                cache=tmp_path / "edge",
            )
            assert done.returncode == 0, done.stderr
            reports[name] = json.loads((tmp_path / name / "run.json").read_text())
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in reports]
    assert adapters[0] == adapters[1]
    assert reports["slow"]["link"] == "100:100:100"
    assert reports["as-it-is"]["link"] is None
    wires = [report["cost"]["wire"] for report in reports.values()]
    assert [wires[0][way] for way in ("up_bytes", "down_bytes")] == [
        wires[1][way] for way in ("up_bytes", "down_bytes")
    ]
    assert reports["slow"]["cost"]["edge"]["wait_s"] >= 2 * steps * round_trip_s  # a forward and a backward each
