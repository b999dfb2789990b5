"""What these tests share: a served model that answers in letters by a chat template, and a run on it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.adapter_files import PEFT_WEIGHTS
from tests.faults.training import run_here, settings
from tests.harness import Server, save_tiny_model, serving
from tests.using.plain import Plain

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="package")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says letters, which are read back as the tokens that they were, and now and then stops."""
    place = tmp_path_factory.mktemp("talker") / "tiny-talker"
    save_tiny_model(place, "llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    said = tokenizer("abcdefghijklmnopqrstuvwxyz ")["input_ids"]
    unsaid = torch.ones(model.config.vocab_size, dtype=torch.bool)
    unsaid[[*said, tokenizer.eos_token_id]] = False
    with torch.no_grad():
        model.lm_head.weight[unsaid] = 0.0
    model.save_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="package")
def node(talker: Path, cache: Path) -> Iterator[Server]:
    with serving(talker, "--cut", "1:1", cache=cache) as server:
        yield server
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def run(node: Server, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter was drawn, and matters."""
    place = tmp_path_factory.mktemp("runs") / "run"
    run_here(settings(node, rows, steps=1), place)
    path = place / "adapter" / PEFT_WEIGHTS
    torch.manual_seed(1)
    save_file({name: 0.3 * torch.randn_like(value) for name, value in load_file(path).items()}, path)
    return place


@pytest.fixture(scope="package")
def classifier(node: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a classifier."""
    place, data = tmp_path_factory.mktemp("classifiers") / "run", tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    rows = [{"text": text, "label": label} for text, label in (("a gem", "good"), ("dull", "bad"))]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run_here(settings(node, data, steps=1, batch_size=2), place)
    return place


@pytest.fixture(scope="package")
def plain(talker: Path, run: Path) -> Plain:
    """The other side of comparisons."""
    return Plain(talker, run)
