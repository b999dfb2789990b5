"""Undisturbed runs, which every disturbed one must equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.training import adapter, moved, run_here, settings
from tests.harness import Server

Adapter = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def undisturbed_run(
    servers: dict[str, Server], rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The directory of a run with these settings on a server that nobody touches; made once for each."""
    made: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            run_here(settings(servers["llama"], rows, **changes), out)
            assert moved([value for name, value in adapter(out).items() if "lora_B" in name])
            made[key] = out
        return made[key]

    return run


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: Callable[..., Path]) -> Callable[..., Adapter]:
    """The adapter of such a run."""
    return lambda **changes: adapter(undisturbed_run(**changes))
