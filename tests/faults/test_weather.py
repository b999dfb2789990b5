"""A mobile network's weather costs time and nothing else: the run learns the same bits, each step once."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_client import server as fetching
from edge_client.link import Link
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from isthmus.trust import certificates
from tests.bad_input.raw import describe, opening
from tests.faults.conftest import Adapter
from tests.faults.proxy import Proxy, Weather, proxied
from tests.faults.training import Background, adapter, run_here, same_bits, settings
from tests.harness import Server, serving

STEPS = 10
PHONE = Weather(late_s=0.1, jitter_s=0.025)
"""A round trip of 200 ms, give or take 50."""
WEATHERS = {
    "200 ms, give or take 50": PHONE,
    "1 Mbit/s": Weather(rate=125_000),
    "in pieces": Weather(pieces=400),
    "stalls": Weather(stalls_every=40_000),
    "all of it": Weather(late_s=0.05, jitter_s=0.04, rate=500_000, pieces=4000, stalls_every=200_000),
}
METHODS: dict[str, dict[str, object]] = {
    "split": {"microbatches": 2},
    "dlora": {"method": "dlora", "kr_active": 0.5, "kr_period": 2, "kr_warmup": 2, "kr_idle": "park"},
}


@pytest.fixture
def proxy(servers: dict[str, Server]) -> Iterator[Proxy]:
    with proxied(servers["llama"].address) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: Proxy, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Background]:
    """Begin a run whose line goes through the proxy."""

    def begin(**changes: object) -> Background:
        config = settings(None, rows, server=proxy.address, steps=STEPS, **changes)
        return Background(config, tmp_path / "run", monkeypatch)

    return begin


def each_step_once(out: Path, steps: int = STEPS) -> bool:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))


def as_undisturbed(run: Background, expected: Adapter) -> RunReport:
    report = run.result()
    assert report.status == "complete"
    assert each_step_once(run.out)
    assert same_bits(adapter(run.out), expected)
    assert report.agreement is not None
    assert report.agreement.equal
    return report


@pytest.mark.parametrize(
    ("weather", "method"),
    [*((weather, "split") for weather in WEATHERS), ("in pieces", "dlora"), ("all of it", "dlora")],
)
def test_a_slow_line_changes_nothing(
    proxy: Proxy, through: Callable[..., Background], undisturbed: Callable[..., Adapter], weather: str, method: str
) -> None:
    expected = undisturbed(steps=STEPS, **METHODS[method])
    proxy.weather = WEATHERS[weather]
    report = as_undisturbed(through(**METHODS[method]), expected)
    assert report.agreement is not None
    assert report.agreement.unchecked_streams == 0, "a slow line is no reason to reconnect"


@pytest.mark.parametrize("method", METHODS)
def test_resets_at_any_byte_change_nothing(
    proxy: Proxy, through: Callable[..., Background], undisturbed: Callable[..., Adapter], method: str
) -> None:
    expected = undisturbed(steps=STEPS, **METHODS[method])
    run = through(**METHODS[method])
    run.reaches(2)
    proxy.resets.extend((0, 1, 9, 24, 100, 333, 1000, 2000, 5000, 20_000))
    proxy.cut()
    report = as_undisturbed(run, expected)
    assert not proxy.resets, "all of them were met"
    assert report.cost.wire.resent_bytes > 0


def test_a_line_that_is_cut_again_and_again_changes_nothing(
    proxy: Proxy, through: Callable[..., Background], undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(steps=STEPS, microbatches=2)
    run = through(microbatches=2)
    chance = random.Random(0)
    run.reaches(1)
    for _ in range(8):
        time.sleep(chance.uniform(0.01, 0.4))
        proxy.cut()
    as_undisturbed(run, expected)


def test_a_line_that_stands_still_and_moves_on_changes_nothing(
    proxy: Proxy, through: Callable[..., Background], undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(steps=STEPS, microbatches=2)
    run = through(microbatches=2)
    run.reaches(2)
    proxy.change(still=True)
    time.sleep(3)
    run.must_go_on()
    proxy.change(still=False)
    as_undisturbed(run, expected)


def test_an_end_that_comes_late_changes_nothing(
    proxy: Proxy, through: Callable[..., Background], undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(steps=STEPS, microbatches=2)
    proxy.change(slow_close_s=1.0)
    as_undisturbed(through(microbatches=2), expected)


def test_what_falls_into_a_hole_is_noticed_and_sent_again_when_the_hole_is_closed(
    proxy: Proxy, through: Callable[..., Background], undisturbed: Callable[..., Adapter]
) -> None:
    expected = undisturbed(steps=STEPS, microbatches=2)
    run = through(microbatches=2, patience=120)
    run.reaches(2)
    proxy.change(hole=True)
    threading.Timer(10, lambda: proxy.change(hole=False)).start()
    report = run.result(within_s=240)
    assert report.cost.wire.resent_bytes > 0
    as_undisturbed(run, expected)


def test_the_ends_are_fetched_through_resets_from_where_they_stopped(
    proxy: Proxy, servers: dict[str, Server], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(fetching, "ANSWER_WITHIN_S", 10.0)
    proxy.resets.extend((30_000, 60_000, 200))
    changes = {"steps": 2}
    report = run_here(settings(None, rows, server=proxy.address, **changes), tmp_path / "run")
    assert not proxy.resets
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "other"))
    fair = run_here(settings(servers["llama"], rows, **changes), tmp_path / "fair")
    assert same_bits(adapter(tmp_path / "run"), adapter(tmp_path / "fair"))
    fetched, once = (each.cost.wire.by_phase.fetch.down_bytes for each in (report, fair))
    assert once <= fetched < 1.5 * once


def test_a_session_over_mutual_tls_outlives_resets_and_a_new_server_on_the_same_port(
    tiny_models: dict[str, Path],
    rows: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., Adapter],
) -> None:
    expected = undisturbed(steps=STEPS, microbatches=2)
    certificates.init_authority(tmp_path / "certs")
    certificates.issue(tmp_path / "certs", "alice")
    flags = ("--cut", "1:1", "--certs", str(tmp_path / "certs" / "server"))
    with serving(tiny_models["llama"], *flags, cache=cache) as server, proxied(server.address, PHONE) as proxy:
        certs = tmp_path / "certs" / "alice"
        config = settings(None, rows, server=proxy.address, steps=STEPS, microbatches=2, certs=certs)
        run = Background(config, tmp_path / "run", monkeypatch)
        run.reaches(2)
        proxy.resets.extend((3, 700, 3000, 9000))
        proxy.cut()
        run.reaches(5)
        server.process.kill()
        server.process.wait(10)
        with serving(tiny_models["llama"], *flags, cache=cache, port=int(server.address.rpartition(":")[2])):
            as_undisturbed(run, expected)


def test_a_session_begins_through_resets(proxy: Proxy) -> None:
    card = describe(proxy.address, None)
    link = Link(proxy.address, None, opening(card, "through-resets"), Ledger(), card.limits)
    proxy.resets.extend((0, 30, 200))
    link.open()
    link.close()
    assert not proxy.resets
