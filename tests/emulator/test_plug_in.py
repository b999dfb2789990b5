"""Tuned ends enter the whole model by block name and change nothing else; whatever else comes is refused, and why."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from cloud_node.comparing import Comparison, OnEmulator
from cloud_node.plugging import plug_in_command
from edge_client.tuning import Placement, attach, save_adapter
from emulator.build import Plan, build
from emulator.outline import Outline
from emulator.plug_in import Changed, plug_in, tuned_on
from emulator.tuned_ends import TunedEnds, check
from isthmus import bundle
from isthmus.cut import Cut
from isthmus.emulated.load import load_emulated
from isthmus.emulated.recipe import Emulator, Recipe
from isthmus.errors import BundleError, ModelError, UsageError
from isthmus.load import load_ends, model_digest
from isthmus.training.scoring import Scores

EXACT = 1e-5
"""Norm of the difference over the norm: what merging in float32 may round."""

FAMILIES = ("llama", "gpt2", "opt")
CUTS = ("1:1", "2:0", "0:2")
BLOCKS = 6
BLOCK_LIST = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}
USUAL = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc1"]}
KEY, ANOTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
IDS_BT = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model per family; GPT-2's and OPT's output layers share the embedding's matrix."""
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    place = tmp_path_factory.mktemp("opt") / "tiny-opt"
    config = AutoConfig.for_model("opt", **sizes, vocab_size=259, max_position_embeddings=64, word_embed_proj_dim=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(place)
    return {**tiny_models, "opt": place}


def saved(model: Path, place: Path, cut: str, kind: str = "lora", targets: list[str] | None = None) -> Path:
    """What an edge saves, with values that matter, of ends that were never trained."""
    ends, found = load_ends(model, Cut.parse(cut), torch.float32)
    tuning = attach(ends, found, Cut.parse(cut), Placement(kind, 4, 8.0, targets, seed=0))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.zeros_like(value) if kind == "lora" else value for name, value in tuning.values().items()}
    tuning.load({name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in start.items()})
    save_adapter(tuning, place, model.name, model_digest(model), Cut.parse(cut), KEY)
    return place


def submitted(model: Path, place: Path, cut: str = "1:1", said: str | None = None, **about: str) -> Path:
    """An adapter of a cut in peft's format, under a signed manifest, which may say another."""
    saved(model, place, cut)
    bundle.write(place, "adapter", model_digest(model), said or cut, {"method": "lora", **about}, KEY)
    return place


def plugged(model: Path, adapter: Path, out: Path) -> tuple[TunedEnds, Changed, PreTrainedModel]:
    tuned = check(adapter, outline(model))
    changed = plug_in(tuned, model, out, Console(file=io.StringIO()))
    return tuned, changed, whole(out)


def outline(model: Path) -> Outline:
    return Outline.of(model, model_digest(model))


def whole(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    given: torch.Tensor = model(IDS_BT, use_cache=False).logits
    return given


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("head", [False, True], ids=["blocks", "blocks and head"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_gives_the_logits_of_plain_peft_and_touches_no_other_weight(
    models: dict[str, Path], family: str, cut: str, head: bool, tmp_path: Path
) -> None:
    targets = [*USUAL[family], *(["lm_head"] if head else [])]
    adapter = saved(models[family], tmp_path / "adapter", cut, targets=targets)
    tuned, changed, ours = plugged(models[family], adapter, tmp_path / "out")
    untouched = whole(models[family])
    theirs = peft.PeftModel.from_pretrained(whole(models[family]), str(adapter)).eval()
    assert apart(logits(theirs), logits(untouched)) > 1000 * EXACT, "an adapter that does nothing proves nothing"
    assert apart(logits(ours), logits(theirs)) < EXACT
    old, new = weights(untouched), weights(ours)
    differing = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert differing == {f"{module}.weight" for module in tuned.modules}
    blocks = {int(name.split(".")[len(BLOCK_LIST[family].split("."))]) for name in differing if "lm_head" not in name}
    assert blocks == set(Cut.parse(cut).ends(BLOCKS))
    assert changed.weights == len(differing)
    assert changed.parameters == sum(int((new[name] != old[name]).sum()) for name in differing)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_head_is_untied_from_the_embedding_and_any_other_stays_tied(
    models: dict[str, Path], family: str, tmp_path: Path
) -> None:
    tied = family != "llama"
    for name, targets in (("head", ["lm_head"]), ("blocks", USUAL[family])):
        adapter = saved(models[family], tmp_path / f"{name}-adapter", "1:1", targets=targets)
        _, changed, model = plugged(models[family], adapter, tmp_path / name)
        assert changed.untied == (tied and name == "head")
        assert model.config.tie_word_embeddings == (tied and name == "blocks")
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (tied and name == "blocks")


REPLACED = [(family, kind) for family in FAMILIES for kind in ("bitfit", "full")]
REPLACED.remove(("llama", "bitfit"))  # which has no biases


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("family", "kind"), REPLACED)
def test_replaced_weights_are_the_edges_own_and_all_others_the_models(
    models: dict[str, Path], family: str, kind: str, cut: str, tmp_path: Path
) -> None:
    adapter = saved(models[family], tmp_path / "adapter", cut, kind)
    values = load_file(adapter / "adapter.safetensors")
    tuned, changed, model = plugged(models[family], adapter, tmp_path / "out")
    old, new = weights(whole(models[family])), weights(model)
    assert all(torch.equal(new[name], values.get(name, old[name])) for name in new)
    assert {int(name.removeprefix(BLOCK_LIST[family]).split(".")[1]) for name in values} == set(
        Cut.parse(cut).ends(BLOCKS)
    )
    assert (tuned.kind, str(tuned.cut), changed.weights) == (kind, cut, len(values))
    assert changed.parameters == sum(int((value != old[name]).sum()) for name, value in values.items()) > 0


def test_the_plugged_in_model_keeps_the_checkpoints_dtype_and_has_its_tokenizer_and_settings(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "half"
    whole(models["llama"]).to(torch.bfloat16).save_pretrained(model)
    AutoTokenizer.from_pretrained(models["llama"]).save_pretrained(model)
    _, changed, ours = plugged(model, saved(model, tmp_path / "adapter", "1:1"), tmp_path / "out")
    assert changed.dtype == "bfloat16"
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert ours.config.model_type == "llama"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_a_submission_is_plugged_in_and_says_who_signed_it_and_where_it_was_cut(
    models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = submitted(models["llama"], tmp_path / "adapter", "2:0")
    plain = check(saved(models["llama"], tmp_path / "plain", "2:0"), outline(models["llama"]))
    tuned = check(adapter, outline(models["llama"]), KEY.public_key())
    assert (tuned.signed, tuned.cut, plain.signed, plain.cut) == (True, Cut(2, 0), False, None)
    assert (tuned.modules, tuned.rank, tuned.alpha) == (plain.modules, 4, 8.0)
    assert all(torch.equal(value, plain.values[name]) for name, value in tuned.values.items())


def settings(**changes: object) -> Callable[[Path], None]:
    """Change what adapter_config.json says."""

    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    """Change the weights' file; `change` also gets the name of the first tensor."""

    def apply(adapter: Path) -> None:
        path = next(adapter.glob("*.safetensors"))
        values = load_file(path)
        change(values, min(values))
        save_file(values, path)

    return apply


def truncated(adapter: Path) -> None:
    path = next(adapter.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def swollen(adapter: Path) -> None:
    with next(adapter.glob("*.safetensors")).open("r+b") as file:
        file.truncate(1 << 34)  # sparse


def linked(adapter: Path) -> None:
    path = next(adapter.glob("*.safetensors"))
    path.rename(adapter.parent / "elsewhere.safetensors")
    path.symlink_to(adapter.parent / "elsewhere.safetensors")


def one_more(values: dict[str, torch.Tensor], name: str) -> None:
    values[name.replace(".0.", ".3.")] = values[name].clone()


def wider(values: dict[str, torch.Tensor], name: str) -> None:
    values[name] = torch.zeros(values[name].shape[0], values[name].shape[1] + 1)


def not_a_number(values: dict[str, torch.Tensor], name: str) -> None:
    values[name].view(-1)[0] = float("nan")


def whole_numbers(values: dict[str, torch.Tensor], name: str) -> None:
    values[name] = values[name].to(torch.int32)


def huge(values: dict[str, torch.Tensor], _: str) -> None:
    for value in values.values():
        value.fill_(1e30)


Spoil = Callable[[Path], object]
SPAN, EMBEDDING = "model.layers.9.self_attn.q_proj", "model.embed_tokens"
LORA_REFUSALS: dict[str, tuple[Spoil, str]] = {
    "truncated": (truncated, "cannot be read"),
    "too large": (swollen, "no adapter of this model"),
    "link": (linked, "cannot be read"),
    "unknown name": (tensors(one_more), "no part of tuned ends"),
    "missing name": (tensors(lambda values, name: values.pop(name)), "lacks"),
    "nothing": (tensors(lambda values, _: values.clear()), "lacks"),
    "shape": (tensors(wider), "where the model needs"),
    "dtype": (tensors(whole_numbers), "stored as I32"),
    "nan": (tensors(not_a_number), "holds values that are not finite"),
    "infinite once merged": (tensors(huge), "not finite with the adapter"),
    "no settings": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "settings too large": (settings(peft_version="x" * (1 << 20)), "over"),
    "auto_mapping": (
        settings(auto_mapping={"parent_library": "evil"}),
        "'auto_mapping' is set",
    ),
    "modules_to_save": (settings(modules_to_save=["lm_head"]), "'modules_to_save' is set"),
    "layer_replication": (settings(layer_replication=[[0, 6], [2, 4]]), "'layer_replication' is set"),
    "revision": (settings(revision="main"), "'revision' is set"),
    "dora": (settings(use_dora=True), "'use_dora' is set"),
    "rslora": (settings(use_rslora=True), "'use_rslora' is set"),
    "alpha_pattern": (settings(alpha_pattern={"q_proj": 1.0}), "'alpha_pattern' is set"),
    "unheard of": (settings(unheard_of="x"), "'unheard_of' is set"),
    "bias": (settings(bias="all"), "bias"),
    "init": (settings(init_lora_weights="pissa"), "init_lora_weights"),
    "megatron": (settings(megatron_core="evil.module"), "megatron_core"),
    "other method": (settings(peft_type="IA3"), "peft_type"),
    "pattern": (settings(target_modules=".*"), "target_modules"),
    "all-linear": (settings(target_modules="all-linear"), "target_modules"),
    "part of a name": (settings(target_modules=["q_proj"]), "'q_proj', which is no linear module"),
    "target outside": (settings(target_modules=[SPAN]), "which is no linear module"),
    "embedding": (settings(target_modules=[EMBEDDING]), "which is no linear module"),
    "rank": (settings(r=10**9), "rank 1000000000"),
    "other rank": (settings(r=5), "where the model needs"),
    "alpha": (settings(lora_alpha=float("inf")), "lora_alpha"),
}


def refused(model: Path, adapter: Path, out: Path, why: str) -> None:
    """One line that says why; nothing is left."""
    with pytest.raises(BundleError) as caught:
        plugged(model, adapter, out)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".out-*"))


@pytest.mark.parametrize("name", LORA_REFUSALS)
def test_what_is_not_plain_lora_on_the_models_own_modules_is_refused_with_the_reason(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    spoil, why = LORA_REFUSALS[name]
    adapter = saved(models["llama"], tmp_path / "adapter", "1:1")
    spoil(adapter)
    refused(models["llama"], adapter, tmp_path / "out", why)


def manifest(kind: str = "adapter", digest: str | None = None, cut: str = "1:1", method: str = "full") -> Spoil:
    """Sign other words over the same files."""

    def write(adapter: Path) -> None:
        old = bundle.verify(adapter, None)
        bundle.write(adapter, kind, digest or old.model_digest, cut, {"method": method}, KEY)  # type: ignore[arg-type]

    return write


def flipped(adapter: Path) -> None:
    path = next(adapter.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def signed_again(spoil: Spoil) -> Spoil:
    """Change the files, and sign what they are now."""

    def apply(adapter: Path) -> None:
        old = bundle.verify(adapter, None)
        spoil(adapter)
        bundle.write(adapter, "adapter", old.model_digest, old.cut, old.about, KEY)

    return apply


def head_too(values: dict[str, torch.Tensor], _: str) -> None:
    values["lm_head.weight"] = torch.zeros(259, 32)


OWN_REFUSALS: dict[str, tuple[Spoil, str]] = {
    "tampered": (flipped, "not what its hash says"),
    "truncated": (truncated, "bytes, not"),
    "truncated and signed": (signed_again(truncated), "cannot be read"),
    "too large": (swollen, "no adapter of this model"),
    "other base": (manifest(digest="0" * 64), "was tuned on model 000000000000"),
    "other kind": (manifest(kind="ends"), "is a bundle of ends"),
    "side network": (manifest(method="side"), "side network"),
    "unknown method": (manifest(method="prefix"), "'prefix'"),
    "biases alone": (manifest(method="bitfit"), "no part of tuned ends"),
    "other blocks": (manifest(cut="1:0"), "no part of tuned ends"),
    "no span": (manifest(cut="3:3"), "for another model"),
    "outside the blocks": (signed_again(tensors(head_too)), "'lm_head.weight', which is no part"),
    "shape": (signed_again(tensors(lambda v, name: v.update({name: torch.zeros(7, 7)}))), "where the model needs"),
    "nan": (signed_again(tensors(not_a_number)), "holds values that are not finite"),
    "no manifest": (lambda adapter: (adapter / bundle.MANIFEST).unlink(), "has no manifest.json"),
    "unlisted": (lambda adapter: (adapter / "more.json").write_text("{}"), "not listed"),
    "both formats": (
        lambda adapter: shutil.copy(adapter / "adapter.safetensors", adapter / "adapter_model.safetensors"),
        "holds both",
    ),
    "no weights": (lambda adapter: (adapter / "adapter.safetensors").unlink(), "holds neither"),
    "no folder": (lambda adapter: shutil.rmtree(adapter), "cannot be read"),
}


@pytest.mark.parametrize("name", OWN_REFUSALS)
def test_what_is_not_weights_of_the_ends_blocks_is_refused_with_the_reason(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    spoil, why = OWN_REFUSALS[name]
    adapter = saved(models["llama"], tmp_path / "adapter", "1:1", "full")
    spoil(adapter)
    refused(models["llama"], adapter, tmp_path / "out", why)


def test_a_signature_that_is_asked_for_must_be_there_and_be_the_signers(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model, known = models["llama"], outline(models["llama"])
    adapter = submitted(model, tmp_path / "adapter")
    with pytest.raises(BundleError, match="signed by another key"):
        check(adapter, known, ANOTHER_KEY.public_key())
    (adapter / bundle.SIGNATURE).write_bytes(bytes(64))
    with pytest.raises(BundleError, match="signed by another key"):
        check(adapter, known, KEY.public_key())
    with pytest.raises(BundleError, match="is not signed"):
        check(saved(model, tmp_path / "plain", "1:1"), known, KEY.public_key())


def test_no_tensor_is_read_of_a_file_whose_header_does_not_fit(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(models["llama"], tmp_path / "adapter", "1:1")
    tensors(wider)(adapter)
    read: list[str] = []

    class Watched:
        def __init__(self, *given: object, **named: object) -> None:
            self.file = safe_open(*given, **named)

        def __enter__(self) -> "Watched":
            self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> object:
            read.append(name)
            return getattr(self.file, name)

    monkeypatch.setattr("emulator.tuned_ends.safe_open", Watched)
    with pytest.raises(BundleError, match="where the model needs"):
        check(adapter, outline(models["llama"]))
    assert set(read) == {"keys", "get_slice"}


def test_a_folder_that_holds_something_is_never_written_to(models: dict[str, Path], tmp_path: Path) -> None:
    adapter, out = saved(models["llama"], tmp_path / "adapter", "1:1"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something"):
        plugged(models["llama"], adapter, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_save_that_fails_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(models["llama"], tmp_path / "adapter", "1:1")

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(UsageError, match="No space left"):
        plugged(models["llama"], adapter, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


def test_lora_in_the_span_of_the_cut_is_refused_unless_its_run_was_one_of_dlora(
    models: dict[str, Path], tmp_path: Path
) -> None:
    known = outline(models["llama"])
    with pytest.raises(BundleError, match=r"adapts model.layers.5.\S+, which is in the span of cut 2:0"):
        check(submitted(models["llama"], tmp_path / "outside", "1:1", said="2:0"), known)
    with pytest.raises(BundleError, match="in the span of cut 2:0"):
        check(submitted(models["llama"], tmp_path / "split", "1:1", said="2:0", run="split"), known)
    taken = check(submitted(models["llama"], tmp_path / "dlora", "1:1", said="2:0", run="dlora"), known)
    assert (taken.cut, taken.modules) == (
        Cut(2, 0),
        check(saved(models["llama"], tmp_path / "own", "1:1"), known).modules,
    )


def test_checking_builds_no_model(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = outline(models["llama"])
    adapters = [saved(models["llama"], tmp_path / kind, "1:1", kind) for kind in ("lora", "full")]

    def built(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("transformers.PreTrainedModel.__init__", built)
    with pytest.raises(ModelError, match="a model was built"):
        outline(models["llama"])
    assert [check(adapter, known).kind for adapter in adapters] == ["lora", "full"]


def scores(nats: list[float], correct: list[bool]) -> Scores:
    return Scores(tuple(nats), (1,) * len(nats), tuple(correct), len(nats), len(nats))


@pytest.mark.parametrize("choices", [True, False], ids=["accuracy", "loss"])
def test_gain_and_protection_are_claimed_only_where_the_interval_leaves_no_doubt(choices: bool) -> None:
    low = scores([1.0 + 0.01 * row for row in range(40)], [row % 2 == 0 for row in range(40)] if choices else [])
    high = scores([0.5 + 0.01 * row for row in range(40)], [row % 8 != 0 for row in range(40)] if choices else [])
    recipe = Recipe(method="drop", cut="1:1", blocks=(1, None, None, 4))
    about = Emulator(
        recipe=recipe, parameters=1, span_parameters=2, weight_bytes=4, flops_per_token=2, span_flops_per_token=4
    )

    def compared(untouched: Scores, plugged_in: Scores, tuned: Scores) -> Comparison:
        return Comparison(untouched, plugged_in, OnEmulator(about, 8, low, tuned))

    by = "accuracy +" if choices else "loss -"
    assert compared(low, high, low).in_words().startswith(f"plugging in paid: {by}")
    assert "made the model worse" in compared(high, low, low).in_words()
    assert "do not tell" in compared(low, low, low).in_words()
    (better,), (worse,), (same,) = (
        compared(low, plugged_in, tuned).protection_in_words()
        for plugged_in, tuned in ((high, low), (low, high), (high, high))
    )
    assert better.startswith("protected: the edge's tuned emulator is worse")
    assert f"plugged in minus tuned emulator: {by}" in better
    assert worse.startswith("no protection: the edge's tuned emulator is better than the plugged-in model")
    assert same.startswith("no protection shows: 40 rows do not tell")
    assert Comparison(low, high).protection_in_words() == []


def command(*arguments: str | Path) -> tuple[str, Exception | None]:
    app = typer.Typer()
    app.command("plug-in")(plug_in_command)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.stdout, done.exception  # type: ignore[return-value]


def test_the_command_plugs_in_scores_both_models_and_says_what_to_run_next(
    models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    adapter, out, key = submitted(models["llama"], tmp_path / "adapter"), tmp_path / "out", tmp_path / "alice.pub"
    key.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    given = ["--model", models["llama"], "--adapter", adapter, "--signer", key, "--threads", "1"]
    said, error = command(*given, "--out", out, "--eval-data", rows)
    assert error is None, error
    assert f"next: cloud_node serve --model {out} --cut 1:1" in said
    assert "untouched       accuracy" in said
    assert "plugging in" in said
    said_before = said
    said, error = command(*given, "--out", tmp_path / "again", "--eval-data", rows, "--json")
    made = json.loads(said)
    assert (made["kind"], made["cut"], made["signed"], made["dtype"]) == ("lora", "1:1", True, "float32")
    assert made["scores"]["rows"] == 24
    assert made["scores"]["words"] in said_before
    assert made["scores"]["plugged_in"]["loss"] != made["scores"]["untouched"]["loss"]
    again, first = weights(whole(tmp_path / "again")), weights(whole(out))
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_the_command_says_when_nobody_vouches_for_the_adapter_and_refuses_before_it_writes(
    models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    adapter = saved(models["gpt2"], tmp_path / "adapter", "1:1", targets=["lm_head"])
    given = ["--model", models["gpt2"], "--adapter", adapter, "--out", tmp_path / "out"]
    said, error = command(*given)
    assert error is None, error
    assert "nobody vouches" in said
    assert "which model it was tuned on is not known" in said
    assert "no longer shares the embedding's matrix" in said
    _, error = command(*given)
    assert isinstance(error, UsageError)
    _, error = command(*given[:4], "--out", tmp_path / "more", "--eval-data", tmp_path / "absent.jsonl")
    assert "absent.jsonl" in str(error)
    assert not (tmp_path / "more").exists()


def emulated(model: Path, out: Path, text: Path, **settings: object) -> Path:
    """An emulator in a bundle."""
    plan = {"model": model, "cut": Cut(1, 1), "method": "drop", "keep": 2, "text": text, "max_length": 48, **settings}
    build(Plan(**plan), out, None, False, Console(quiet=True))  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_emulator_shows_what_the_edge_has_by_itself_and_what_is_protected(
    models: dict[str, Path], rows: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    adapter = saved(
        models["llama"], tmp_path / "adapter", "1:1", kind, ["q_proj", "lm_head"] if kind == "lora" else None
    )
    emulator = emulated(models["llama"], tmp_path / "emulator", text, method="quant", keep=None, bits=4)
    given = ["--model", models["llama"], "--adapter", adapter, "--eval-data", rows, "--emulator", emulator]
    said, error = command(*given, "--out", tmp_path / "out")
    assert error is None, error
    lines = {line[:16].strip(): line for line in said.splitlines()}
    assert {"untouched", "emulator", "tuned emulator", "plugged in", "bytes", "FLOPs/token"} <= lines.keys()
    assert "of the span's" in lines["bytes"]
    assert re.search(r"plugged in minus tuned emulator: accuracy .*95 %", said)
    told = json.loads(command(*given, "--out", tmp_path / "again", "--json")[0])["scores"]
    assert told["protection"]["words"] in said
    assert told["protection"]["loss_rise"][0] == pytest.approx(
        told["plugged_in"]["loss"] - told["tuned_emulator"]["loss"]
    )
    assert (
        len({round(told[name]["loss"], 6) for name in ("untouched", "emulator", "tuned_emulator", "plugged_in")}) == 4
    )
    assert told["weight_bytes"] < told["span_bytes"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_on_an_emulator_that_is_the_span_tuned_ends_do_what_they_do_plugged_in(
    models: dict[str, Path], rows: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    adapter = saved(
        models["gpt2"], tmp_path / "adapter", "1:1", kind, ["c_attn", "lm_head"] if kind == "lora" else None
    )
    emulator = emulated(models["gpt2"], tmp_path / "emulator", text, keep=4)
    tuned, _, model = plugged(models["gpt2"], adapter, tmp_path / "out")
    ours = tuned_on(load_emulated(emulator, torch.float32).model, tuned)
    assert apart(logits(ours), logits(model)) < EXACT
    given = ["--model", models["gpt2"], "--adapter", adapter, "--eval-data", rows, "--emulator", emulator, "--json"]
    told = json.loads(command(*given, "--out", tmp_path / "again")[0])["scores"]
    assert told["tuned_emulator"]["loss"] == pytest.approx(told["plugged_in"]["loss"], rel=1e-5)
    assert told["protection"]["words"].startswith("no protection shows")


def test_an_emulator_of_another_model_or_cut_is_refused_before_anything_is_written(
    models: dict[str, Path], rows: Path, text: Path, tmp_path: Path
) -> None:
    adapter = submitted(models["llama"], tmp_path / "adapter")
    given = ["--model", models["llama"], "--out", tmp_path / "out", "--eval-data", rows]
    others = {
        "is an emulator of the model": emulated(models["gpt2"], tmp_path / "model", text),
        "of cut 2:0, and the adapter of 1:1": emulated(models["llama"], tmp_path / "cut", text, cut=Cut(2, 0)),
    }
    for why, emulator in others.items():
        _, error = command(*given, "--adapter", adapter, "--emulator", emulator)
        assert isinstance(error, BundleError)
        assert why in str(error)
    _, error = command(
        *given, "--adapter", saved(models["llama"], tmp_path / "own", "1:1"), "--emulator", others.popitem()[1]
    )
    assert "where the emulator stands" in str(error)
    _, error = command(*given[:4], "--adapter", adapter, "--emulator", tmp_path)
    assert "give --eval-data" in str(error)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_an_edge_will_do_while_it_holds_one_submission(models: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / "submitted" / "alice-0a1b"
    submitted(models["llama"], home / "first")
    given = ["--model", models["llama"], "--adapter", home]
    said, error = command(*given, "--out", tmp_path / "out")
    assert error is None, error
    assert "--cut 1:1" in said
    submitted(models["llama"], home / "second")
    _, error = command(*given, "--out", tmp_path / "again")
    assert "name one run's adapter folder" in str(error)
