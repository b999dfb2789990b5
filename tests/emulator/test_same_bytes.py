"""The same plan gives the same bytes in another process too, and what would give others is another build."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from emulator.plan import Plan, Texts, made_of
from isthmus.emulated.recipe import Recipe
from isthmus.errors import UsageError
from isthmus.trust import certificates
from tests.emulator.conftest import CUT, Make
from tests.harness import run_command, save_tiny_model

RECIPE = Recipe(method="drop", cut="1:1", blocks=(1, None, None, 4))


def test_two_processes_give_the_same_folder_byte_by_byte(
    homes: dict[str, Path], text: Path, cache: Path, tmp_path: Path
) -> None:
    certificates.init_authority(tmp_path / "certs", ("localhost",), 1)
    given = ["--model", homes["llama"], "--cut", "1:1", "--text", text, "--distill", text, "--steps", 3]
    plan = [*given, "--max-length", 48, "--method", "rank", "--keep", 0.5, "--bits", 8, "--threads", 2]
    for name in ("one", "two"):
        signed = ["--certs", tmp_path / "certs" / "server", "--out", tmp_path / name]
        done = run_command("cloud_node", "emulator", "build", *map(str, [*plan, *signed]), cache=cache)
        assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def digest(plan: Plan) -> str:
    return made_of(plan, RECIPE, "f" * 64, Texts(None, None))


def test_threads_versions_and_device_make_another_build(
    homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(homes["llama"], CUT, "drop", keep=2)
    found = {digest(plan), digest(replace(plan, device=torch.device("meta")))}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        found.add(digest(plan))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        found.add(digest(plan))
    assert len(found) == 4
    assert digest(plan) in found


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.txt"])
def test_every_file_that_goes_into_the_bundle_makes_another_build(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    plan, path = Plan(tmp_path / "model", CUT, "drop", keep=2), tmp_path / "model" / name
    before = digest(plan)
    path.write_text(path.read_text() + " " if path.exists() else "new")
    assert digest(plan) != before


def test_another_chat_template_is_not_taken_for_the_finished_build(make: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model(model, "llama")
    make(tmp_path / "out", model=model, method="drop", keep=2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages }} anew"
    tokenizer.save_pretrained(model)
    with pytest.raises(UsageError, match="remove it, or name another folder with --out"):
        make(tmp_path / "out", model=model, method="drop", keep=2)
    make(tmp_path / "new", model=model, method="drop", keep=2)
    said = "".join(path.read_text() for path in (tmp_path / "new").glob("*") if path.suffix in (".json", ".jinja"))
    assert "messages }} anew" in said
