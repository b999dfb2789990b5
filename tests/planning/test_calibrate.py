"""`edge_client calibrate` measures a device and a line with what training does on them, and leaves what plans read."""

import json
from pathlib import Path

import pytest

from edge_client.timed_line import settings, time_line
from isthmus.planning.calibration import Calibration, read
from isthmus.planning.links import MBIT
from tests.harness import Server, run_command


@pytest.fixture(scope="module")
def measured(
    servers: dict[str, Server],
    tiny_models: dict[str, Path],
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """What the command printed, and the file that it wrote."""
    out = tmp_path_factory.mktemp("calibration") / "here.json"
    where = ["--server", servers["llama"].address, "--cut", "1:1", "--model", tiny_models["llama"], "--threads", "1"]
    done = run_command("edge_client", "calibrate", *where, "--out", out, "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "this device, 1 thread" in done.stderr
    assert "the line and the server" in done.stderr
    assert "was there before" not in done.stderr
    return done.stdout, out


def test_the_file_is_what_is_printed_and_plans_accept_it(measured: tuple[str, Path]) -> None:
    printed, out = measured
    assert out.read_text() == printed
    found = read(out)
    assert found == Calibration.model_validate_json(printed)
    assert list(found.speeds) == [1]
    assert found.model is not None
    assert (found.model.model_type, found.model.hidden_size, found.model.dtype) == ("llama", 32, "float32")


def test_device_cloud_and_line_are_measured(measured: tuple[str, Path]) -> None:
    found = read(measured[1])
    edge, cloud, link = found.edge, found.cloud, found.link
    assert edge is not None
    assert cloud is not None
    assert link is not None
    for machine in (edge, cloud):
        assert 1e6 < machine.flops < 1e13
        fixed = machine.speed.forward.block_s + machine.speed.forward.call_s
        assert 0 < fixed < 1, "a tiny block takes a while, however few its FLOPs"
    assert 0 < link.round_trip_s < 1
    assert found.handling.byte_s > 0


def test_a_slow_line_is_found_to_be_what_it_is(servers: dict[str, Server], cache: Path) -> None:
    line = time_line(settings(servers["llama"].address, cut="1:1", link="40:4:8"), lambda *_: None).line
    assert line.round_trip_s == pytest.approx(0.04, rel=0.25)
    assert line.up == pytest.approx(4 * MBIT, rel=0.2)
    assert line.down == pytest.approx(8 * MBIT, rel=0.2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "there is nothing to measure; give --model DIR for this device, --server HOST:PORT for the line"),
        (("--model", "llama-9"), "'llama-9' is no directory, config.json or model that was fetched"),
        (("--model", "gpt2", "--dtype", "int3"), "--dtype 'int3' is none of float32, bfloat16"),
        (("--server", "10.0.0.1:7070"), "10.0.0.1 is another machine: give --certs DIR"),
        (("--server", "127.0.0.1:1"), "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    flags: tuple[str, ...], words: str, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "none.json"
    done = run_command("edge_client", "calibrate", *flags, "--out", out, "--json", cache=cache)
    assert done.returncode != 0
    assert not out.exists()
    assert not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("edge_client: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_a_table_says_the_same(tiny_models: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    out.write_text("an older one")
    done = run_command(
        "edge_client", "calibrate", "--model", tiny_models["gpt2"], "--threads", "1", "--out", out, cache=cache
    )
    assert done.returncode == 0, done.stderr
    assert f"{out} was there before: this calibration has replaced it" in done.stderr.replace("\n", "")
    content = json.loads(out.read_text())
    assert content["line"] is content["cloud_speed"] is None
    assert f"{content['speeds']['1']['forward']['flops'] / 1e9:.3g}" in done.stdout
    assert "edge_client plan --calibration" in done.stdout
