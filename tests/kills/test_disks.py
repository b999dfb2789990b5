"""A disk that is full or read-only: one line that says what to do, nothing lost, and on it goes once there is room."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_client.runs import RunDirectory
from isthmus.errors import BundleError, RunError
from isthmus.training.checkpoints import load_checkpoint
from tests.kills.cases import EVERYTHING
from tests.kills.disks import Disk, disk
from tests.kills.disturbed import Place, check_whole
from tests.kills.forked import Forked
from tests.offsite.by_hand import make_run

MIB = 1 << 20
LEFT = range(16) if EVERYTHING else (0, 7)
"""Pages left on a full disk; which file meets its end depends on it."""
READ_ONLY = (False, True) if EVERYTHING else (True,)

SENTENCE = "The river that the old bridge crosses is slow, and in {} it carried {} boats past the mill. "


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "disk", MIB) as found:
        yield found


def refused(command: Forked, *codes: int) -> str:
    """The one line that a command ended with; warnings and progress apart."""
    code = command.wait()
    assert code in codes, command.said
    assert "Traceback" not in command.said
    (line,) = [line for line in command.said.splitlines() if line.startswith(("edge_client: ", "cloud_node: "))]
    assert any(word in line for word in ("cannot be", "can be written", "cannot keep", "make room")), line
    return line


@pytest.fixture
def stopped(place: Place, steady: Forked, small: Disk, tmp_path: Path) -> Path:
    """A run on the small disk that was killed after step 3, with a checkpoint of step 2."""
    out = small.path / "run"
    place.train(place.settings("split", steady.address, tmp_path), out, "metrics-written:3").wait()
    return out


@pytest.mark.parametrize("left", LEFT)
def test_a_run_whose_disk_fills_says_so_keeps_its_checkpoint_and_goes_on_with_room(
    place: Place, stopped: Path, small: Disk, undisturbed: Callable[..., Path], left: int
) -> None:
    small.fill(left)
    line = refused(place.resume(stopped), RunError.exit_code)
    assert "No space left" in line, line
    found = load_checkpoint(RunDirectory(stopped).checkpoints)
    assert found is not None
    assert found.step >= 2
    small.clear()
    again = place.resume(stopped)
    assert again.wait() == 0, again.said
    check_whole(stopped, undisturbed("split"))
    assert not list(stopped.rglob("*.tmp"))


def test_a_run_on_a_disk_that_became_read_only_says_so_and_goes_on_later(
    place: Place, stopped: Path, small: Disk, undisturbed: Callable[..., Path]
) -> None:
    small.read_only()
    assert "Read-only file system" in refused(place.resume(stopped), RunError.exit_code)
    small.read_only(False)
    again = place.resume(stopped)
    assert again.wait() == 0, again.said
    check_whole(stopped, undisturbed("split"))


@pytest.mark.parametrize("read_only", READ_ONLY)
def test_a_new_run_where_nothing_can_be_written_says_so(
    place: Place, steady: Forked, small: Disk, tmp_path: Path, read_only: bool
) -> None:
    small.fill()
    small.read_only(read_only)
    edge = place.train(place.settings("split", steady.address, tmp_path), small.path / "run")
    refused(edge, RunError.exit_code)


@pytest.mark.parametrize("read_only", [False, True])
def test_kept_outputs_and_fetched_bundles_that_find_no_room_end_the_run_in_words(
    place: Place, steady: Forked, undisturbed: Callable[..., Path], small: Disk, tmp_path: Path, read_only: bool
) -> None:
    out, config = tmp_path / "run", place.settings("top", steady.address, small.path)
    (small.path / "outputs").mkdir()
    small.fill()
    small.read_only(read_only)
    line = refused(place.train(config, out), RunError.exit_code)
    assert "--cache" in line
    fetching = place.resume(out, ISTHMUS_CACHE=str(small.path / "bundles"))
    refused(fetching, BundleError.exit_code)
    small.read_only(False)
    small.clear()
    again = place.resume(out, ISTHMUS_CACHE=str(small.path / "bundles"))
    assert again.wait() == 0, again.said
    check_whole(out, undisturbed("top"))


@pytest.mark.parametrize("read_only", [False, True])
def test_an_emulator_that_cannot_be_written_leaves_nothing_and_is_built_with_room(
    place: Place, small: Disk, tmp_path: Path, read_only: bool
) -> None:
    out = small.path / "emulators" / "one"
    out.parent.mkdir()
    small.fill(10)
    small.read_only(read_only)
    flags = ("--model", place.model, "--cut", "1:1", "--method", "drop", "--keep", "2", "--out", out)

    def build() -> Forked:
        return place.forking.start("cloud_node", "emulator", "build", *flags)

    refused(build(), BundleError.exit_code)
    assert list(out.parent.iterdir()) == []
    small.read_only(False)
    small.clear()
    built = build()
    assert built.wait() == 0, built.said
    assert (out / "manifest.json").exists()


def test_a_distillation_whose_disk_fills_keeps_its_checkpoint_and_goes_on_with_room(
    place: Place, small: Disk, tmp_path: Path
) -> None:
    text, outs = tmp_path / "public.txt", (tmp_path / "elsewhere" / "one", small.path / "one")
    text.write_text("".join(SENTENCE.format(1800 + 7 * year, year * year % 41) for year in range(24)))
    flags = ("--model", place.model, "--cut", "1:1", "--method", "drop", "--keep", "2", "--text", text)
    flags = (*flags, "--distill", text, "--steps", "4", "--max-length", "48", "--threads", "1")

    def build(out: Path, *more: str, fault: str = "") -> Forked:
        return place.forking.start("cloud_node", "emulator", "build", *flags, "--out", out, *more, fault=fault)

    small.fill(20)
    refused(build(outs[1]), RunError.exit_code, BundleError.exit_code)
    small.clear()
    for out in outs:
        again = build(out, "--resume")
        assert again.wait() == 0, again.said
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("read_only", READ_ONLY)
def test_a_node_without_room_for_submissions_refuses_them_and_takes_them_later(
    place: Place, small: Disk, tmp_path: Path, read_only: bool
) -> None:
    run, folder = make_run(tmp_path / "run", place.model), small.path / "in"
    node = place.serve("--submissions", folder)
    address = node.address
    small.fill()
    small.read_only(read_only)

    def hand_in() -> Forked:
        return place.forking.start("edge_client", "submit", "--run", run, "--server", address)

    refused(hand_in(), BundleError.exit_code)
    small.read_only(False)
    small.clear()
    assert list(folder.glob("*/*")) == []
    taken = hand_in()
    assert taken.wait() == 0, taken.said
    assert len(list(folder.glob("*/*"))) == 1
    node.kill()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_node_that_cannot_write_its_cache_does_not_start_and_says_why(
    place: Place, small: Disk, read_only: bool
) -> None:
    small.fill()
    small.read_only(read_only)
    command = ("serve", "--model", place.model, "--cut", "1:1", "--listen", "127.0.0.1:0", "--threads", "1")
    node = place.forking.start("cloud_node", *command, ISTHMUS_CACHE=str(small.path / "cache"))
    assert "ISTHMUS_CACHE" in refused(node, BundleError.exit_code)
