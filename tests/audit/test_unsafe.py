"""The check that `make check` makes finds what may turn bytes into code, and leaves the rest alone."""

import pytest

from tests.check_unsafe import unsafe

BAD = (
    "import pickle",
    "import os, marshal",
    "from pickle import loads",
    "from cloudpickle import dumps as d",
    "from torch import load",
    "import torch\ntorch.load(path)",
    "eval(text)",
    "exec(text)",
    "import yaml\nyaml.load(text)",
    "import numpy\nnumpy.load(path, allow_pickle=True)",
    "numpy.load(path, allow_pickle=wish)",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "subprocess.run(line, shell=True)",
    "torch.load(path, weights_only=True)",
    "def f():\n    def g():\n        return __import__(name)",
)
GOOD = (
    "import json\njson.loads(text)",
    "model.eval()",
    "import re\nre.compile(text)",
    "yaml.safe_load(text)",
    "numpy.load(path, allow_pickle=False)",
    "AutoConfig.from_pretrained(path, trust_remote_code=False)",
    "subprocess.run([command])",
    "'pickle' in names",
)


@pytest.mark.parametrize("source", BAD)
def test_what_may_run_bytes_is_found(source: str) -> None:
    assert list(unsafe(source))


@pytest.mark.parametrize("source", GOOD)
def test_what_may_not_is_left_alone(source: str) -> None:
    assert not list(unsafe(source))
