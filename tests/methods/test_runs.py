"""Runs of every method: over the wire as in one process, stopped and resumed, and read by plain `peft` afterwards."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from edge_client import train as training
from edge_client.adapter_folder import load_adapter
from edge_client.assemble import load_local
from edge_client.attaching import attach
from edge_client.config import TrainConfig
from edge_client.finished import Using, continue_prompt, evaluate
from edge_client.runs import RunDirectory
from emulator.tuned_ends import check
from isthmus.errors import BundleError, InterruptedRunError
from isthmus.load import load_tokenizer
from isthmus.report.schema import RunReport
from tests.emulator.adapters import outline
from tests.methods.cases import EACH, IN_PEFT, Case, by_name, named
from tests.methods.conftest import STEPS, Run, carry_out
from tests.parity.reference import padded, ragged_sequences, relative, whole_model
from tests.parity.test_training import AFTER_ADAMW

Settings = Callable[..., TrainConfig]
ABOUT_DEVICES = (
    "Unsupported layer type",  # a norm that peft knows by no name
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly_factor",
    "Model with `tie_word_embeddings=True`",
)
"""What peft says of any model or machine, whatever was saved."""


def values(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "adapter").glob("*.safetensors")))


@pytest.mark.parametrize(("case", "family"), EACH, ids=named)
def test_a_run_over_the_wire_makes_the_adapter_of_a_run_in_one_process(case: Case, family: str, made: Run) -> None:
    split, local = made(case, family), made(case, family, "local")
    ours, theirs = values(split), values(local)
    assert relative(ours, theirs) < AFTER_ADAMW
    assert RunReport.load(split).final_loss == pytest.approx(RunReport.load(local).final_loss, rel=1e-4)
    assert RunReport.load(split).params.changed == pytest.approx(RunReport.load(local).params.changed, rel=0.01)


@contextmanager
def asked_after(steps: int) -> Iterator[object]:
    """A user who asks to stop after so many steps."""

    class Asked:
        def __init__(self) -> None:
            self.looks = 0

        def __bool__(self) -> bool:
            self.looks += 1
            return self.looks >= steps

    yield Asked()


@pytest.mark.parametrize(
    ("case", "family", "stop"),
    [*((case, family, 2) for case, family in EACH), (by_name("adalora"), "llama", 3)],
    ids=named,
)
def test_a_run_that_was_stopped_resumes_to_the_same_bits(
    case: Case, family: str, stop: int, made: Run, configured: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", configured(case, family)
    with monkeypatch.context() as patched:
        patched.setattr(training, "stopping", lambda: asked_after(stop))
        with pytest.raises(InterruptedRunError):
            carry_out(config, out)
    assert RunReport.load(out).steps == stop
    carry_out(RunDirectory(out).config(), out, resume=True)
    assert RunReport.load(out).steps == STEPS
    ours, undisturbed = values(out), values(made(case, family))
    assert ours.keys() == undisturbed.keys()
    assert all(torch.equal(ours[name], value) for name, value in undisturbed.items())


def loaded_by_peft(directory: Path, adapter: Path) -> nn.Module:
    """The whole model with the adapter, if plain peft has nothing to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        for said in ABOUT_DEVICES:
            warnings.filterwarnings("ignore", message=f".*{said}")
        return peft.PeftModel.from_pretrained(whole_model(directory), str(adapter)).eval()


@torch.no_grad()
def real_logits(model: nn.Module) -> torch.Tensor:
    """Logits of the last real token of each row, wherever a prompt has moved it."""
    ids_BT, mask_BT = padded([sequence.ids for sequence in ragged_sequences((9, 5, 12))], left=False)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, -ids_BT.shape[1] :]
    return logits_BTV[mask_BT.bool()]


@pytest.mark.parametrize(("case", "family"), IN_PEFT, ids=named)
def test_plain_peft_loads_what_is_saved_into_the_whole_model_without_a_word_and_without_a_difference(
    case: Case, family: str, made: Run, configured: Settings, tiny_models: dict[str, Path]
) -> None:
    adapter = made(case, family) / "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    edge = load_local(configured(case, family, "local"))
    tuning = attach(edge.model, edge.found, edge.cut, configured(case, family, "local").placement)
    load_adapter(tuning, adapter, None)
    ours, theirs = real_logits(tuning.model), real_logits(loaded_by_peft(tiny_models[family], adapter))
    untouched = real_logits(whole_model(tiny_models[family]))
    assert torch.equal(ours, theirs)
    assert (theirs - untouched).abs().max() > 1e-3, "an adapter that does nothing proves nothing"


@pytest.mark.parametrize(("case", "family"), IN_PEFT, ids=named)
def test_parameters_that_change_are_those_that_differ_once_plain_peft_has_merged_them(
    case: Case, family: str, made: Run, tiny_models: dict[str, Path]
) -> None:
    run = made(case, family)
    report, whole = RunReport.load(run), whole_model(tiny_models[family])
    loaded = loaded_by_peft(tiny_models[family], run / "adapter")
    if case.name in ("prompt", "p-tuning"):
        assert report.params.changed == 0
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = dict(loaded.merge_and_unload().named_parameters())
    differing = sum(int((merged[name] != value).sum()) for name, value in whole.named_parameters())
    assert report.params.changed == differing > 0


USED = {"pissa", "adalora", "prompt", "p-tuning", "trainable-tokens", "head", "ia3"}


@pytest.mark.parametrize(("case", "family"), [(c, f) for c, f in EACH if c.name in USED and f == "llama"], ids=named)
def test_a_finished_run_is_scored_and_continued_as_its_model_in_one_process(
    case: Case, family: str, made: Run, rows: Path, tiny_models: dict[str, Path]
) -> None:
    run, console = made(case, family), Console(quiet=True)
    remote = evaluate(run, rows, Using(), console).score
    local = evaluate(run, rows, Using(span="local", model=str(tiny_models[family])), console).score
    assert remote.loss == pytest.approx(local.loss, rel=1e-5)
    assert remote.loss != pytest.approx(evaluate(run, rows, Using(untouched=True), console).score.loss, rel=1e-5)
    if case.plain is not None:
        whole, tokenizer = loaded_by_peft(tiny_models[family], run / "adapter"), load_tokenizer(tiny_models[family])
        inputs = tokenizer("good and", return_tensors="pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = whole.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ours = continue_prompt(run, "good and", 6, Using(), console).text
        assert ours == tokenizer.decode(theirs, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["pissa", "prompt", "vera", "adalora", "head"])
def test_a_run_can_begin_from_the_adapter_of_another(
    name: str, made: Run, configured: Settings, rows: Path, tmp_path: Path
) -> None:
    case = by_name(name)
    earlier = made(case, "llama")
    settings = configured(case, "llama", from_run=earlier, eval_data=rows, steps=1)
    carry_out(settings, tmp_path / "on")
    before = RunReport.load(tmp_path / "on").eval.before
    assert before.loss == pytest.approx(evaluate(earlier, rows, Using(), Console(quiet=True)).score.loss, rel=1e-5)


def test_p_tuning_cannot_begin_from_another_run_for_its_encoder_is_not_kept(configured: Settings, made: Run) -> None:
    with pytest.raises(ValidationError, match="saves its prompt, not the encoder"):
        configured(by_name("p-tuning"), "llama", from_run=made(by_name("p-tuning"), "llama"))


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal"])
def test_what_began_as_a_part_of_the_weights_is_plain_lora_to_the_models_owner(
    name: str, made: Run, tiny_models: dict[str, Path]
) -> None:
    tuned = check(made(by_name(name), "llama") / "adapter", outline(tiny_models["llama"]))
    assert (tuned.kind, tuned.rank) == ("lora", 4 if name == "orthogonal" else 8)


@pytest.mark.parametrize("name", ["dora", "ia3", "prompt", "head"])
def test_a_method_that_the_owner_cannot_plug_in_is_refused_by_the_owner(
    name: str, made: Run, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(BundleError):
        check(made(by_name(name), "llama") / "adapter", outline(tiny_models["llama"]))
