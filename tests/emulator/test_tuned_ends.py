"""Of a submission it is found out who signed it and where it was cut, and no model is built for that."""

from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from emulator.tuned_ends import check
from isthmus import bundle
from isthmus.cut import Cut
from isthmus.errors import BundleError, ModelError
from tests.emulator.adapters import KEY, outline, saved, submitted

ANOTHER_KEY = Ed25519PrivateKey.generate()


def test_a_submission_is_plugged_in_and_says_who_signed_it_and_where_it_was_cut(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = submitted(tiny_models["llama"], tmp_path / "adapter", "2:0")
    plain = check(saved(tiny_models["llama"], tmp_path / "plain", "2:0"), outline(tiny_models["llama"]))
    tuned = check(adapter, outline(tiny_models["llama"]), KEY.public_key())
    assert (tuned.signed, tuned.cut, plain.signed, plain.cut) == (True, Cut(2, 0), False, None)
    assert (tuned.modules, tuned.rank, tuned.alpha) == (plain.modules, 4, 8.0)
    assert all(torch.equal(value, plain.values[name]) for name, value in tuned.values.items())


def test_a_signature_that_is_asked_for_must_be_there_and_be_the_signers(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model, known = tiny_models["llama"], outline(tiny_models["llama"])
    adapter = submitted(model, tmp_path / "adapter")
    with pytest.raises(BundleError, match="signed by another key"):
        check(adapter, known, ANOTHER_KEY.public_key())
    (adapter / bundle.SIGNATURE).write_bytes(bytes(64))
    with pytest.raises(BundleError, match="signed by another key"):
        check(adapter, known, KEY.public_key())
    with pytest.raises(BundleError, match="is not signed"):
        check(saved(model, tmp_path / "plain", "1:1"), known, KEY.public_key())


def test_lora_in_the_span_of_the_cut_is_refused_unless_its_run_was_one_of_dlora(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    known = outline(tiny_models["llama"])
    with pytest.raises(BundleError, match=r"adapts model.layers.5.\S+, which is in the span of cut 2:0"):
        check(submitted(tiny_models["llama"], tmp_path / "outside", "1:1", said="2:0"), known)
    with pytest.raises(BundleError, match="in the span of cut 2:0"):
        check(submitted(tiny_models["llama"], tmp_path / "split", "1:1", said="2:0", run="split"), known)
    taken = check(submitted(tiny_models["llama"], tmp_path / "dlora", "1:1", said="2:0", run="dlora"), known)
    assert (taken.cut, taken.modules) == (
        Cut(2, 0),
        check(saved(tiny_models["llama"], tmp_path / "own", "1:1"), known).modules,
    )


def test_checking_builds_no_model(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = outline(tiny_models["llama"])
    adapters = [saved(tiny_models["llama"], tmp_path / kind, "1:1", kind) for kind in ("lora", "full")]

    def built(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("transformers.PreTrainedModel.__init__", built)
    with pytest.raises(ModelError, match="a model was built"):
        outline(tiny_models["llama"])
    assert [check(adapter, known).kind for adapter in adapters] == ["lora", "full"]
