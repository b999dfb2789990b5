"""An emulator's build that is killed goes on to the same bytes, and a fetch of one goes on where it stopped."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client.runs import RunDirectory
from isthmus import bundle
from isthmus.faults import Fault
from isthmus.report.schema import RunReport
from tests.faults.training import run_here, settings
from tests.kills.cases import EVERYTHING, STEPS
from tests.kills.disturbed import At, Place, digest
from tests.kills.forked import KILLED, Forked
from tests.offsite.by_hand import MIB, make_emulator

SENTENCE = "The river that the old bridge crosses is slow, and in {} it carried {} boats past the mill. "
POINTS = (
    f"{Fault.DISTIL_AFTER_STEP}:3",
    Fault.CHECKPOINT_HALF_WRITTEN,
    Fault.CHECKPOINT_BEFORE_RENAME,
    Fault.CHECKPOINT_AFTER_RENAME,
    Fault.FOLDER_BEFORE_RENAME,
    Fault.FOLDER_AFTER_RENAME,
)
USUALLY = (Fault.CHECKPOINT_AFTER_RENAME, Fault.FOLDER_BEFORE_RENAME)


class Builds:
    """Builds of the same plan."""

    def __init__(self, place: Place, text: Path) -> None:
        flags = ("--model", place.model, "--cut", "1:1", "--method", "drop", "--keep", "2", "--text", text)
        self._place = place
        self._flags = (*flags, "--distill", text, "--steps", "4", "--max-length", "48", "--threads", "1")

    def start(self, out: Path, *more: str, fault: str = "") -> Forked:
        command = ("emulator", "build", *self._flags, "--out", out, *more)
        return self._place.forking.start("cloud_node", *command, fault=fault)


@pytest.fixture(scope="module")
def builds(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    text = tmp_path_factory.mktemp("text") / "public.txt"
    text.write_text("".join(SENTENCE.format(1800 + 7 * year, year * year % 41) for year in range(24)))
    return Builds(place, text)


@pytest.fixture(scope="module")
def whole(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build makes that nothing happens to."""
    out = tmp_path_factory.mktemp("built") / "one"
    build = builds.start(out)
    assert build.wait() == 0, build.said
    return out


@pytest.mark.parametrize("fault", POINTS if EVERYTHING else USUALLY)
def test_a_build_that_is_killed_goes_on_to_the_same_bundle(
    builds: Builds, whole: Path, tmp_path: Path, fault: str
) -> None:
    out = tmp_path / "one"
    killed = builds.start(out, fault=fault)
    assert killed.wait() == KILLED, killed.said
    assert out.exists() == (fault == Fault.FOLDER_AFTER_RENAME)
    again = builds.start(out, "--resume")
    assert again.wait() == 0, again.said
    assert bundle.verify(out, None).id == bundle.verify(whole, None).id
    left = {path for path in tmp_path.iterdir() if path.name not in ("one", "one.costs.jsonl")}
    # A lock in an empty folder is what a process leaves that dies between its last two calls.
    assert not left or (fault == Fault.FOLDER_AFTER_RENAME and next(iter(left.pop().iterdir())).stat().st_size == 0)


def test_an_edge_that_dies_in_the_middle_of_fetching_an_emulator_goes_on_there(place: Place, tmp_path: Path) -> None:
    emulators, out, fetched = tmp_path / "emulators", tmp_path / "run", str(tmp_path / "fetched")
    make_emulator(emulators / "large", place.model, "1:1", Ed25519PrivateKey.generate(), 3 * MIB)
    node = place.serve("--emulators", emulators)
    config = settings(At(node.address), place.rows, method="offsite", emulator="large", cut=None, steps=STEPS)
    edge = place.train(config, out, f"{Fault.FETCH_HALF_ARRIVED}:6", ISTHMUS_CACHE=fetched)
    assert edge.wait() == KILLED, edge.said
    again = place.resume(out, ISTHMUS_CACHE=fetched)
    assert again.wait() == 0, again.said
    whole = bundle.verify(emulators / "large", None).total_bytes
    assert 0 < RunReport.load(out).cost.wire.by_phase.fetch.down_bytes < whole - 2 * MIB
    run_here(config, tmp_path / "undisturbed")
    assert digest(out) == digest(tmp_path / "undisturbed")
    assert RunDirectory(out).trained().exists()
    node.kill()
