"""An edge hands an adapter in: what is whole, signed and fits is kept once; of what is refused nothing stays."""

import io
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from cloud_node.config import ServeConfig
from cloud_node.submissions import folder_of
from edge_client import submitting
from edge_client.runs import RunDirectory
from edge_client.sealed_adapter import write_sealed
from edge_client.submitting import pack, submit
from isthmus import bundle
from isthmus.adapter_files import PEFT_WEIGHTS
from isthmus.errors import (
    BundleError,
    CutError,
    ForbiddenError,
    IsthmusError,
    LimitError,
    RunError,
    UnreachableError,
    UsageError,
)
from isthmus.report.schema import RunReport
from isthmus.settings import read_settings
from isthmus.trust.seal_keys import Passphrase, keep
from isthmus.trust.sealing import Seal
from isthmus.wire.gen import backbone_pb2 as pb
from tests.faults.training import wait_until
from tests.harness import Server, serving
from tests.offsite.by_hand import change_weights, make_full_run, make_run
from tests.offsite.conftest import Node


def hand_in(node: Node, run: Path, name: str) -> pb.SubmitReceipt:
    return submit(run, node.server.address, node.owner / name, False, Console(file=io.StringIO()))


@pytest.fixture
def run(node: Node, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", node.model)


@pytest.fixture
def nothing_stays(node: Node) -> Iterator[None]:
    before = node.kept()
    yield
    assert node.kept() == before


def test_an_adapter_is_kept_as_its_edge_signed_it_and_logged(node: Node, run: Path) -> None:
    receipt = hand_in(node, run, "alice")
    assert not receipt.already
    folder = node.submissions / folder_of("spiffe://isthmus/edge/alice") / receipt.bundle
    manifest = bundle.verify(folder, node.identity("alice").signing_key().public_key())
    assert (manifest.id, manifest.kind, manifest.cut) == (receipt.bundle, "adapter", "1:1")
    assert manifest.about.items() >= {"method": "lora", "format": "peft"}.items()
    for name in (PEFT_WEIGHTS, "adapter_config.json"):
        assert (folder / name).read_bytes() == (run / "adapter" / name).read_bytes()
    taken = f"submission {receipt.bundle} of spiffe://isthmus/edge/alice taken"
    wait_until(lambda: taken in node.server.log, "the line in the log")
    (line,) = (line for line in node.server.log.splitlines() if taken in line)
    said = shlex.split(line.partition("; next: ")[2])
    assert said[:2] == ["cloud_node", "plug-in"]
    flags = dict(zip(said[2::2], said[3::2], strict=True))
    assert flags["--adapter"] == str(folder)
    assert flags["--signer"].endswith("/signers/alice.pub")
    assert Path(flags["--out"]).parts[0] == "plugged-in"


def test_the_same_submission_again_is_answered_already_and_another_is_kept_beside_it(
    node: Node, run: Path, tmp_path: Path
) -> None:
    first, kept = hand_in(node, run, "bob"), node.kept()
    again = hand_in(node, run, "bob")
    assert (again.bundle, again.already) == (first.bundle, True)
    assert node.kept() == kept
    other = hand_in(node, make_run(tmp_path / "other", node.model, seed=1), "bob")
    assert not other.already
    assert other.bundle != first.bundle


def test_a_kept_one_that_was_damaged_since_is_taken_anew(node: Node, run: Path) -> None:
    receipt = hand_in(node, run, "dave")
    folder = node.submissions / folder_of("spiffe://isthmus/edge/dave") / receipt.bundle
    (folder / PEFT_WEIGHTS).write_bytes(b"rot")
    assert not hand_in(node, run, "dave").already
    bundle.verify(folder, None)


def test_weights_in_the_format_of_isthmus_keep_what_their_bundle_said(node: Node, tmp_path: Path) -> None:
    run = make_full_run(tmp_path / "run", node.model)
    about = pack(run, empty(tmp_path / "packed"), Ed25519PrivateKey.generate()).about
    assert about.items() >= {"method": "full", "said": 1, "format": "isthmus"}.items()
    assert not hand_in(node, run, "alice").already


def test_a_sealed_run_hands_in_the_very_adapter_that_was_sealed(
    node: Node, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = hand_in(node, run, "alice")
    directory = RunDirectory(run)
    directory.seal = Seal.new()
    keep(directory.seal, directory.seal_file, Passphrase("words"))
    for path in list(directory.adapter.iterdir()):
        write_sealed({path.name: path.read_bytes()}, directory.adapter, directory.seal)
        path.unlink()
    with pytest.raises(UsageError, match="ISTHMUS_PASSPHRASE"):
        hand_in(node, run, "alice")
    monkeypatch.setenv("ISTHMUS_PASSPHRASE", "words")
    receipt = hand_in(node, run, "alice")
    assert (receipt.bundle, receipt.already) == (plain.bundle, True)
    assert hand_in(node, run, "bob").bundle == plain.bundle


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("nothing_stays")
def test_an_adapter_of_another_model_is_refused(node: Node, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="of another model than this node's"):
        hand_in(node, make_run(tmp_path / "run", node.model, digest="f" * 64), "carol")


@pytest.mark.usefixtures("nothing_stays")
def test_an_adapter_of_a_cut_that_nothing_was_given_out_for_is_refused(node: Node, tmp_path: Path) -> None:
    with pytest.raises(CutError, match=r"for cut 0:3, and this node gives out 1:1, 2:0, 2:1"):
        hand_in(node, make_run(tmp_path / "run", node.model, cut="0:3"), "carol")


@pytest.mark.usefixtures("nothing_stays")
def test_an_adapter_larger_than_twice_what_was_given_out_is_refused_with_the_limit(node: Node, run: Path) -> None:
    limit = 2 * bundle.verify(node.emulators / "half", None).total_bytes
    with (run / "adapter" / PEFT_WEIGHTS).open("ab") as file:
        file.truncate(limit + 1)
    with pytest.raises(LimitError, match=f"this node takes {limit} at cut 1:1"):
        hand_in(node, run, "carol")


@pytest.mark.usefixtures("nothing_stays")
def test_an_edge_without_a_key_at_the_node_is_refused(node: Node, run: Path) -> None:
    with pytest.raises(ForbiddenError, match="no signing key of spiffe://isthmus/edge/mallory"):
        hand_in(node, run, "mallory")


@pytest.mark.usefixtures("nothing_stays")
def test_a_signature_of_another_edge_is_refused(node: Node, run: Path) -> None:
    with pytest.raises(BundleError, match="signature is not its sender's"):
        hand_in(node, run, "swapped")


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(node: Node, run: Path, value: float) -> None:
    change_weights(run, value)
    with pytest.raises(BundleError, match="finite") as caught:
        hand_in(node, run, "carol")
    assert str(node.submissions) not in str(caught.value)
    refused = "of spiffe://isthmus/edge/carol refused: "
    wait_until(lambda: refused in node.server.log, "the line in the log")


def test_a_node_that_takes_none_says_so(servers: dict[str, Server], run: Path) -> None:
    with pytest.raises(ForbiddenError, match="takes no adapters"):
        submit(run, servers["llama"].address, None, False, Console(file=io.StringIO()))


def test_a_lost_line_is_tried_again_and_a_refusal_is_not(
    node: Node, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[IsthmusError] = []
    pauses: list[float] = []

    def failing(error: IsthmusError) -> None:
        def once(*_: object) -> pb.SubmitReceipt:
            tries.append(error)
            raise error

        monkeypatch.setattr(submitting, "_send", once)

    monkeypatch.setattr("edge_client.server.time.sleep", pauses.append)
    for error, count in ((UnreachableError("lost"), 5), (BundleError("no"), 1)):
        tries.clear()
        failing(error)
        with pytest.raises(type(error)):
            hand_in(node, run, "carol")
        assert len(tries) == count
    assert len(pauses) == 4


def test_a_run_that_cannot_be_handed_in_says_what_to_do(node: Node, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--server is needed"):
        submit(run, None, None, False, Console(file=io.StringIO()))
    with pytest.raises(UsageError, match="--insecure"):
        submit(run, "gpu.example.org:7070", None, False, Console(file=io.StringIO()))
    (run / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="no adapter yet"):
        hand_in(node, run, "carol")


def test_a_node_with_certificates_takes_no_adapters_whose_signatures_it_could_not_check(tmp_path: Path) -> None:
    given = {"model": "m", "submissions": tmp_path, "certs": tmp_path}
    with pytest.raises(UsageError, match=r"--submissions needs --signers, .* certs/authority/issued"):
        read_settings(ServeConfig, None, given)
    assert read_settings(ServeConfig, None, {**given, "signers": tmp_path}).signers == tmp_path


def test_a_node_without_certificates_says_that_it_checks_no_signature(node: Node, cache: Path, tmp_path: Path) -> None:
    flags = ("--cut", "1:1", "--submissions", str(tmp_path / "in"))
    with serving(node.model, *flags, cache=cache) as server:
        assert "without --certs nobody's signature is checked" in server.log


def test_what_it_sent_stands_in_the_runs_ledger_and_report(node: Node, run: Path) -> None:
    stored = bundle_bytes_of(run)
    hand_in(node, run, "alice")
    once = RunReport.load(run).cost.wire.by_phase.submit
    assert stored < once.up_bytes < stored + 4096
    assert 0 < once.down_bytes < 256
    hand_in(node, run, "alice")  # sent whole, and found to be there already
    ledger, twice = RunDirectory(run).ledger(), RunReport.load(run).cost.wire.by_phase.submit
    assert twice.up_bytes == ledger.total("submit", "up_bytes") == 2 * once.up_bytes
    assert ledger.total("submit", "up_payload_bytes") == 2 * stored


def test_a_refused_adapter_was_sent_all_the_same(node: Node, run: Path) -> None:
    with pytest.raises(BundleError, match="signature is not its sender's"):
        hand_in(node, run, "swapped")
    assert RunReport.load(run).cost.wire.by_phase.submit.up_bytes > 0


def bundle_bytes_of(run: Path) -> int:
    """Bytes of an adapter's files."""
    return sum(path.stat().st_size for path in (run / "adapter").iterdir())
