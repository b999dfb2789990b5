"""Models and servers of every family that DLoRA is proved on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.dlora.reference import CUTS, FAMILIES
from tests.harness import Server, byte_tokenizer, serving
from tests.parity.test_families import configuration, save


@pytest.fixture(scope="package")
def homes(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model per family.

    OPT is smooth here: which side of its own ReLU's kink a value falls on is a matter of rounding, hence of the
    processor, and five steps of AdamW make much of it. `tests.parity.test_families` has it as it is.
    """
    places = dict(tiny_models)
    for family in FAMILIES.keys() - places.keys():
        shape = configuration(family)
        if family == "opt":
            shape.activation_function = "gelu"
        places[family] = save(tmp_path_factory.mktemp(family), shape)
        byte_tokenizer().save_pretrained(places[family])
    return places


@pytest.fixture(scope="package")
def spans(homes: dict[str, Path], servers: dict[str, Server], cache: Path) -> Iterator[dict[str, Server]]:
    """A plaintext server process per family; tests must not stop it."""
    others = sorted(FAMILIES.keys() - servers.keys())
    flags = [flag for cut in CUTS for flag in ("--cut", cut)]
    with ExitStack() as stack, ThreadPoolExecutor(len(others)) as pool:
        starting = [serving(homes[family], *flags, cache=cache) for family in others]
        started = pool.map(stack.enter_context, starting)
        yield {**servers, **dict(zip(others, started, strict=True))}
