"""A plugged-in model says where it is from, and is a model like any other to whoever loads, cuts or serves it."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_node.ends import ends_bundle
from emulator.plug_in import plug_in
from emulator.tuned_ends import check
from isthmus import __version__, bundle
from isthmus.cut import Cut
from isthmus.load import model_digest
from isthmus.trust.credentials import fingerprint
from tests.emulator.adapters import KEY, outline, plugged, saved, submitted, whole
from tests.emulator.conftest import QUIET, Make

ORIGIN = "plugged_in.json"


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "whoever's"])
def test_the_folder_says_where_the_model_is_from(signed: bool, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    home = tiny_models["llama"]
    adapter = submitted(home, tmp_path / "adapter")
    plug_in(check(adapter, outline(home), KEY.public_key() if signed else None), home, tmp_path / "out", QUIET)
    assert json.loads((tmp_path / "out" / ORIGIN).read_text()) == {
        "format": "isthmus-plugged-in/1",
        "model_digest": model_digest(home),
        "adapter": bundle.verify(adapter, None).id,
        "signer": fingerprint(KEY.public_key()) if signed else None,
        "isthmus": __version__,
    }


def test_an_adapter_without_a_manifest_has_no_id(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    plugged(tiny_models["llama"], saved(tiny_models["llama"], tmp_path / "adapter", "1:1"), tmp_path / "out")
    told = json.loads((tmp_path / "out" / ORIGIN).read_text())
    assert (told["adapter"], told["signer"]) == (None, None)


def test_no_bundle_made_of_it_gives_its_origin_away_and_what_is_plugged_into_it_names_it(
    make: Make, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plugged(tiny_models["llama"], submitted(tiny_models["llama"], tmp_path / "adapter"), out)
    digest = model_digest(out)
    ends = ends_bundle(out, digest, Cut(1, 1), Ed25519PrivateKey.generate(), tmp_path / "cache")
    make(tmp_path / "emulator", model=out, method="drop", keep=2)
    for folder in (ends, tmp_path / "emulator"):
        assert bundle.verify(folder, None).model_digest == digest
        assert not (folder / ORIGIN).exists()
    plugged(out, submitted(out, tmp_path / "second"), tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / ORIGIN).read_text())["model_digest"] == digest
    (out / ORIGIN).unlink()
    assert model_digest(out) == digest
    assert whole(tmp_path / "twice").config.model_type == "llama"
