"""Runs that keep their span's outputs: without a server, after damage, side by side and interrupted, the bits stay.

Whatever is kept is either what the server would answer for this very run, or is not used.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edge_client.assemble import connect
from edge_client.cached import Row
from edge_client.prefetch import prefetch
from edge_client.runs import RunDirectory
from edge_client.server import describe, describe_or_recall
from isthmus.errors import ModelError, RunError, UnreachableError
from isthmus.ledger.record import Ledger
from isthmus.report.schema import RunReport
from tests.cache.training import METHODS, Visiting, client, entries, fetched, kept, results, run_kept, same
from tests.faults.training import (
    WITHIN_S,
    Background,
    as_flags,
    command_here,
    run_here,
    steps_done,
    wait_until,
)
from tests.harness import Server, save_tiny_model, serving, start_server, write_rows

LONG: dict[str, Any] = {"batch_size": 4, "steps": 60, "checkpoint_every": 1, "eval_data": None}
"""An epoch of these on `many` rows has 50 steps: long enough to do something in its middle."""

EPOCH = 50


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("many") / "rows.jsonl", count=EPOCH * 4)


@pytest.fixture(scope="module")
def visiting(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Visiting]:
    own = tmp_path_factory.mktemp("visiting")
    visiting = Visiting(lambda port: start_server(tiny_models["llama"], "--cut", "1:1", cache=own, port=port))
    yield visiting
    visiting.end()


WITH_SERVER: dict[str, tuple[str, dict[str, Any]]] = {
    "top": ("top", {}),
    "top, not deterministic, in microbatches": ("top", {"deterministic": False, "microbatches": 2}),
    "top, rounded": ("top", {"deterministic": False, "codec": "int8"}),
    "side": ("side", {}),
}


@pytest.fixture(scope="module")
def first(visiting: Visiting, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of each kind above, each beside the cache that it filled."""
    place = tmp_path_factory.mktemp("first")
    for name, (method, changes) in WITH_SERVER.items():
        report = run_kept(visiting.come(), rows, place / name / "cache", place / name / "run", method, **changes)
        assert fetched(report) == len(entries(place / name / "cache")) > 0
    for method in METHODS:
        prefetch(kept(visiting.come(), rows, place / f"{method} ahead", method), Console(quiet=True))
    return place


# Without a server


@pytest.mark.parametrize("name", WITH_SERVER)
def test_with_the_outputs_kept_and_the_server_gone_a_run_equals_the_one_that_had_the_server(
    first: Path, visiting: Visiting, rows: Path, tmp_path: Path, name: str
) -> None:
    method, changes = WITH_SERVER[name]
    report = run_kept(visiting.go(), rows, first / name / "cache", tmp_path / "run", method, **changes)
    assert same(tmp_path / "run", first / name / "run")
    assert fetched(report) == 0
    assert (report.cost.wire.up_bytes, report.cost.wire.down_bytes) == (0, 0)
    assert report.eval.after.loss is not None


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_were_fetched_ahead_serve_as_well_as_those_of_a_first_run(
    first: Path, visiting: Visiting, rows: Path, tmp_path: Path, method: str
) -> None:
    report = run_kept(visiting.go(), rows, first / f"{method} ahead", tmp_path / "run", method)
    assert fetched(report) == 0
    assert same(tmp_path / "run", first / method / "run")


def test_another_seed_needs_no_server_either_and_learns_something_else(
    first: Path, visiting: Visiting, rows: Path, tmp_path: Path
) -> None:
    assert fetched(run_kept(visiting.go(), rows, first / "top" / "cache", tmp_path / "run", seed=1)) == 0
    assert results(tmp_path / "run")[1] != results(first / "top" / "run")[1]


def test_a_process_without_a_server_trains_and_scores_and_says_nothing_but_that(
    first: Path, visiting: Visiting, rows: Path, tmp_path: Path, cache: Path
) -> None:
    flags = as_flags(kept(visiting.go(), rows, first / "side" / "cache", "side"))
    with client(cache, "train", *flags, "--out", tmp_path / "run") as process:
        _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, said
    assert {line.partition(" ")[0] for line in said.splitlines()} == {"evaluate", "train"}, said
    assert same(tmp_path / "run", first / "side" / "run")


def test_a_finished_run_is_scored_without_a_server(
    first: Path,
    visiting: Visiting,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    visiting.go()
    for method in METHODS:
        out = first / method / "run"
        code, said = command_here(monkeypatch, capsys, "evaluate", "--run", out, "--data", rows)
        assert code == 0, said


def test_a_row_that_is_missing_ends_the_run_in_one_line_and_it_resumes_when_the_server_is_back(
    first: Path,
    visiting: Visiting,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where, out = Path(shutil.copytree(first / "top" / "cache", tmp_path / "cache")), tmp_path / "run"
    entries(where)[0].unlink()
    server = visiting.go()
    code, said = command_here(monkeypatch, capsys, "train", *as_flags(kept(server, rows, where)), "--out", out)
    assert code == UnreachableError.exit_code, said
    lines = [line for line in said.splitlines() if line.startswith("edge_client: ")]
    assert len(lines) == 1, said
    assert said.splitlines()[-1] == lines[0]
    assert server.address in lines[0]
    assert "Traceback" not in said
    assert RunReport.load(out).status == "failed"

    visiting.come()
    report = run_here(RunDirectory(out).config(), out, resume=True)
    assert (report.status, fetched(report)) == ("complete", 1)
    assert same(out, first / "top" / "run")


# Damage, and outputs of something else


def harm(found: list[Path]) -> int:
    """Damage some entries, each in another way; how many."""
    short, flipped, empty, one, other = found[:5]
    short.write_bytes(short.read_bytes()[:-1])
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    empty.write_bytes(b"")
    swapped = one.read_bytes(), other.read_bytes()
    other.write_bytes(swapped[0])
    one.write_bytes(swapped[1])
    return 5


@pytest.mark.parametrize("method", METHODS)
def test_exactly_what_is_damaged_is_fetched_again(
    first: Path, servers: dict[str, Server], rows: Path, tmp_path: Path, method: str
) -> None:
    where = Path(shutil.copytree(first / method / "cache", tmp_path / "cache"))
    harmed = harm(entries(where))
    report = run_kept(servers["llama"], rows, where, tmp_path / "run", method)
    assert fetched(report) == harmed
    assert same(tmp_path / "run", first / method / "run")
    assert fetched(run_kept(servers["llama"], rows, where, tmp_path / "again", method)) == 0


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("top", {"codec": "bf16"}),
        ("top", {"cut": "0:2"}),
        ("top", {"dtype": "bfloat16"}),
        ("top", {"deterministic": False}),
        ("side", {"codec_port": "bf16"}),
        ("side", {"tap_width": 8}),
        ("side", {"tap_every": 2}),
        ("side", {"cut": "0:0"}),
    ],
)
def test_outputs_of_another_codec_cut_type_or_shape_are_never_used(
    first: Path, servers: dict[str, Server], rows: Path, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    where = Path(shutil.copytree(first / method / "cache", tmp_path / "cache"))
    before = len(entries(where))
    changes = {"steps": 3, "eval_data": None, **changes}
    report = run_kept(servers["llama"], rows, where, tmp_path / "run", method, **changes)
    assert fetched(report) == len(entries(where)) - before > 0
    assert report.cost.wire.cache is not None
    assert report.cost.wire.cache.train.cached_rows == 24 - fetched(report)  # rows that are twice in the data


# Side by side, and in little room


def test_two_processes_that_begin_together_on_one_cache_end_as_each_would_alone(
    servers: dict[str, Server], many: Path, tmp_path: Path, cache: Path
) -> None:
    where, server = tmp_path / "cache", servers["llama"]
    settings: dict[str, Any] = {"batch_size": 16, "steps": 15, "eval_data": None}

    def command(seed: int) -> list[str | Path]:
        return ["train", *as_flags(kept(server, many, where, seed=seed, **settings)), "--out", tmp_path / f"run-{seed}"]

    with client(cache, *command(0)) as one, client(cache, *command(1)) as other:
        said = [process.communicate(timeout=WITHIN_S)[1] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), said
    for seed in (0, 1):
        run_kept(server, many, tmp_path / f"own-{seed}", tmp_path / f"alone-{seed}", seed=seed, **settings)
        assert same(tmp_path / f"run-{seed}", tmp_path / f"alone-{seed}")
    assert not same(tmp_path / "run-0", tmp_path / "run-1")
    assert [path.name for path in entries(where)] == [path.name for path in entries(tmp_path / "own-0")]
    assert fetched(run_kept(server, many, where, tmp_path / "after", **settings)) == 0


def test_a_run_with_less_room_than_its_data_needs_fetches_again_and_stays_within_it(
    first: Path, servers: dict[str, Server], rows: Path, tmp_path: Path
) -> None:
    whole = entries(first / "side" / "cache")
    limit = sum(path.stat().st_size for path in whole) // 2
    where = tmp_path / "cache"
    report = run_kept(servers["llama"], rows, where, tmp_path / "run", "side", cache_limit=limit)
    assert same(tmp_path / "run", first / "side" / "run")
    assert fetched(report) > len(whole)
    assert 0 < sum(path.stat().st_size for path in where.rglob("*") if path.is_file()) <= limit


# Interrupted


@pytest.fixture(scope="module")
def undisturbed(servers: dict[str, Server], many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on many rows that nothing happens to, beside its cache."""
    place = tmp_path_factory.mktemp("undisturbed")
    run_kept(servers["llama"], many, place / "cache", place / "run", **LONG)
    return place


def test_a_client_killed_while_it_fills_the_cache_resumes_to_the_same_bits(
    undisturbed: Path, servers: dict[str, Server], many: Path, tmp_path: Path, cache: Path
) -> None:
    where, out, distinct = tmp_path / "cache", tmp_path / "run", len(entries(undisturbed / "cache"))
    flags = as_flags(kept(servers["llama"], many, where, **LONG))
    with client(cache, "train", *flags, "--out", out) as process:
        wait_until(lambda: process.poll() is not None or steps_done(out) >= 3, "step 3")
        process.kill()
        process.wait(10)
    assert steps_done(out) < EPOCH
    there = len(entries(where))
    assert 0 < there < distinct
    report = run_here(RunDirectory(out).config(), out, resume=True)
    assert report.status == "complete"
    assert same(out, undisturbed / "run")
    assert [path.name for path in entries(where)] == [path.name for path in entries(undisturbed / "cache")]


def test_a_server_restarted_while_the_cache_is_filled_changes_nothing(
    undisturbed: Path, visiting: Visiting, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Background(kept(visiting.come(), many, tmp_path / "cache", **LONG), tmp_path / "run", monkeypatch)
    run.reaches(3)
    visiting.go()
    assert steps_done(run.out) < EPOCH
    run.must_go_on()
    visiting.come()
    report = run.result()
    assert report.status == "complete"
    assert fetched(report) == len(entries(undisturbed / "cache"))
    assert same(run.out, undisturbed / "run")


# The model card of a server that is gone


def test_a_model_card_that_is_damaged_is_as_good_as_none(visiting: Visiting, tmp_path: Path) -> None:
    card, present = describe_or_recall(visiting.come().address, None, Ledger(), tmp_path)
    assert present
    address = visiting.go().address
    assert describe_or_recall(address, None, Ledger(), tmp_path) == (card, False)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    torn = [whole[:length] for length in range(len(whole))]
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    for content in (*torn, *flipped):
        file.write_bytes(content)
        with pytest.raises(UnreachableError, match=address):
            describe_or_recall(address, None, Ledger(), tmp_path)


def test_a_server_that_was_never_met_has_no_card(visiting: Visiting, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="nothing listens"):
        describe_or_recall(visiting.go().address, None, Ledger(), tmp_path)


def test_another_model_at_the_address_is_refused_where_outputs_of_the_first_are_used(
    first: Path, visiting: Visiting, rows: Path, tmp_path: Path
) -> None:
    where = Path(shutil.copytree(first / "top" / "cache", tmp_path / "cache"))
    known = visiting.go()
    before = entries(where)
    remembering = connect(kept(known, rows, where), Ledger(), lambda *_: None)
    save_tiny_model(tmp_path / "other", "llama", seed=7)
    port = int(known.address.rpartition(":")[2])
    with serving(tmp_path / "other", "--cut", "1:1", cache=tmp_path / "own", port=port) as other:
        assert other.address == known.address
        assert describe(other.address, None, Ledger()).model_digest != remembering.digest
        outputs = remembering.cached_outputs()
        with pytest.raises(ModelError) as refused:
            outputs.of([Row((3, 4, 5))])
        assert "\n" not in str(refused.value)
        assert "model" in str(refused.value)
        remembering.close()
        assert entries(where) == before

        report = run_kept(other, rows, where, tmp_path / "run")
        assert fetched(report) == len(before)
        assert not same(tmp_path / "run", first / "top" / "run")
        shutil.copytree(first / "top" / "run", tmp_path / "resumed")
        with pytest.raises(RunError, match="model is not what this run began with"):
            run_here(kept(other, rows, where), tmp_path / "resumed", resume=True)
