"""`cloud_node emulator`: what an owner types, and what is said at the end."""

import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner, Result

from cloud_node.emulators import app
from emulator.pair import Pair
from isthmus import bundle
from isthmus.emulated.recipe import Emulator
from isthmus.errors import BundleError, InterruptedRunError, IsthmusError, UsageError
from isthmus.trust import certificates
from isthmus.trust.credentials import Credentials


def run(*arguments: object) -> Result:
    """Run the command; an error of the catalogue is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, IsthmusError):
        raise result.exception
    return result


def flags(homes: dict[str, Path], text: Path, out: Path) -> list[object]:
    return ["build", "--model", homes["llama"], "--cut", "1:1", "--text", text, "--max-length", 48, "--out", out]


def test_a_build_ends_with_a_table_and_the_next_command(homes: dict[str, Path], text: Path, tmp_path: Path) -> None:
    result = run(*flags(homes, text, tmp_path / "emulators" / "thin"), "--method", "rank", "--keep", "0.5", "--bits", 8)
    assert result.exit_code == 0, result.output
    lines = {line.partition(" ")[0]: line for line in result.stdout.splitlines()}
    manifest = bundle.verify(tmp_path / "emulators" / "thin", None)
    assert manifest.id in lines["bundle"]
    assert "4 of 4: 1, 2, 3, 4" in lines["blocks"]
    assert "self_attn.q_proj 8" in lines["ranks"]
    assert "of the span's 148,480" in lines["bytes"]
    assert "%" in lines["FLOPs/token"]
    assert {"distance", "loss", "bits", "method"} <= lines.keys()
    distance = Emulator.load(tmp_path / "emulators" / "thin").distance
    assert distance is not None
    assert lines["measured"].endswith(f"{distance.rows} held-out rows, {distance.tokens:,} tokens")
    assert lines["interval"].endswith(
        f"means little of {distance.rows} held-out rows, a tenth of the text: 240 rows of text (a .jsonl has one a "
        "line, a .txt is cut into rows of 48 tokens) would do"
    )
    assert re.search(r"[+-]\d+\.\d+ nats per token \(95 % [+-]\d+\.\d+ to [+-]\d+\.\d+\)$", lines["gap"])
    assert lines["next:"] == (
        f"next: cloud_node serve --emulators {tmp_path / 'emulators' / 'thin'} --model {homes['llama']} --cut 1:1"
    )


def test_an_emulator_that_protects_nothing_is_told_as_such_and_enough_rows_leave_the_interval_uncommented(
    homes: dict[str, Path], plenty: Path, tmp_path: Path
) -> None:
    whole = run(*flags(homes, plenty, tmp_path / "whole"), "--method", "drop", "--keep", 4).stdout
    assert (
        "\nprotection   nothing is protected, as far as these rows tell: the interval of the gap includes 0\n" in whole
    )
    assert "-0.0000" not in whole
    assert "\ninterval" not in whole


@pytest.mark.parametrize("command", ["build", "evaluate"])
def test_ctrl_c_while_measuring_ends_in_one_line_and_the_exit_code_of_what_was_interrupted(
    command: str, homes: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*flags(homes, text, tmp_path / "out"), "--method", "drop", "--keep", 2]
    if command == "evaluate":
        run(*given)
        given = ["evaluate", "--emulator", tmp_path / "out", "--text", text, "--model", homes["llama"]]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pair, "compare", interrupted)
    with pytest.raises(InterruptedRunError, match=r"^interrupted; nothing is kept: the same command begins anew$"):
        run(*given)


def test_ctrl_c_before_anything_is_loaded_says_so_too(
    homes: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emulator.build.read_texts", interrupted)
    with pytest.raises(InterruptedRunError, match="nothing is kept"):
        run(*flags(homes, text, tmp_path / "out"), "--method", "drop", "--keep", 2)


def test_a_damaged_emulator_is_measured_by_nobody_and_its_owner_is_not_told_to_fetch_it(
    homes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(*flags(homes, text, out), "--method", "drop", "--keep", 2)
    (out / "emulator.json").write_bytes((out / "emulator.json").read_bytes().replace(b'"drop"', b'"Drop"'))
    with pytest.raises(BundleError, match=r"hash says: build the emulator anew, or restore it from a copy$"):
        run("evaluate", "--emulator", out, "--text", text, "--model", homes["llama"])


def test_json_says_everything_that_the_bundle_says(homes: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = json.loads(run(*flags(homes, text, out), "--method", "drop", "--keep", 2, "--json").stdout)
    assert told.items() >= json.loads((out / "emulator.json").read_text()).items()
    assert told["bundle"] == bundle.verify(out, None).id
    assert told["gap"] == told["distance"]["loss"] - told["distance"]["loss_of_span"]
    assert told["span_bytes"] == 2 * told["weight_bytes"]


def test_text_defaults_to_what_is_distilled_on(homes: dict[str, Path], text: Path, tmp_path: Path) -> None:
    given = ["build", "--model", homes["gpt2"], "--cut", "1:1", "--distill", text, "--steps", 12, "--batch-size", 2]
    told = json.loads(
        run(*given, "--method", "rank", "--keep", 0.3, "--max-length", 48, "--out", tmp_path / "out", "--json").stdout
    )
    assert told["distance"]["text"] == told["distillation"]["text"]
    assert (told["distillation"]["steps"], told["distillation"]["lr"]) == (12, 1e-4)


def test_the_servers_key_signs(homes: dict[str, Path], text: Path, tmp_path: Path) -> None:
    certificates.init_authority(tmp_path / "certs", ("localhost",), 1)
    server = tmp_path / "certs" / "server"
    run(*flags(homes, text, tmp_path / "out"), "--method", "drop", "--keep", 2, "--certs", server)
    publisher: Ed25519PublicKey = Credentials.load(server).signing_key().public_key()
    bundle.verify(tmp_path / "out", publisher)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "drop", "--keep", "half"], "--keep: 'half' is neither a whole number of blocks nor a share"),
        (["--method", "drop", "--keep", "-1"], "--keep -1.0 is neither"),
        (["--method", "prune"], "--method: Input should be 'drop', 'share', 'rank' or 'quant'"),
        (["--keep", "2"], "method rank keeps a share of each matrix, such as --keep 0.5; 2 is not"),
        (["--method", "drop", "--keep", "2", "--bits", "3"], "--bits: Input should be 4 or 8"),
        (["--method", "drop", "--keep", "2", "--steps", "9"], "--steps is for distilling: give --distill"),
        (["--method", "drop", "--keep", "2", "--device", "abacus"], "no device 'abacus' here; use auto, cpu or cuda"),
        (["--method", "drop", "--keep", "2", "--minimum-gap", "nan"], "--minimum-gap: Input should be a finite"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    given: list[str], message: str, homes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(*flags(homes, text, tmp_path / "out"), *given)
    assert not list(tmp_path.iterdir())


def test_an_emulator_is_measured_anew_and_of_another_model_refused(
    homes: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    built = json.loads(run(*flags(homes, text, out), "--method", "drop", "--keep", 2, "--json").stdout)
    asked = ["evaluate", "--emulator", out, "--text", text, "--max-length", 48]
    told = json.loads(run(*asked, "--model", homes["llama"], "--json").stdout)
    assert told["distance"] == built["distance"]
    assert (told["bundle"], told["gap"]) == (built["bundle"], built["gap"])
    said = run(*asked, "--model", homes["llama"]).stdout
    assert said.startswith(f"model        {told['model'][:16]}, which the emulator was built from")
    assert re.search(r"^gap .*nats per token \(95 % ", said, re.MULTILINE)
    with pytest.raises(UsageError, match="no device 'abacus' here"):
        run(*asked, "--model", homes["llama"], "--device", "abacus")
    with pytest.raises(BundleError, match="is an emulator of the model"):
        run(*asked, "--model", homes["gpt2"])
