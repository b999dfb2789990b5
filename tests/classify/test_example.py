"""The example of pictures runs as it stands, learns, and what it saves loads into the whole classifier."""

import subprocess
import sys
from pathlib import Path

import peft
from transformers import AutoModelForImageClassification

from tests.drop_in.test_examples import ROOT
from tests.harness import ENVIRONMENT, Server, serving


def test_the_example_of_pictures(encoders: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    with serving(encoders["vit"], "--cut", "1:1", cache=cache) as server:
        done = example(server, cache, tmp_path)
    assert done.returncode == 0, done.stderr
    told = int(done.stdout.splitlines()[-1].split()[0])
    assert told > 16, "two thirds would be told by chance once in a million"
    whole = AutoModelForImageClassification.from_pretrained(encoders["vit"], num_labels=3)
    peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")


def example(server: Server, cache: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "pictures.py"), server.address, str(tmp_path / "adapter")],
        env={**ENVIRONMENT, "ISTHMUS_CACHE": str(cache)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
