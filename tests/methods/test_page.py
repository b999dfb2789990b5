"""docs/methods.md says what is so."""

from pathlib import Path

from tests.methods.cases import CASES, FAMILIES
from tests.methods.page import PAGE, REMAKE, page


def test_the_page_of_methods_is_current(tiny_models: dict[str, Path]) -> None:
    made = page(tiny_models)
    assert PAGE.read_text() == made, f"run `{REMAKE}`"
    for case in CASES:
        row = next(line for line in made.splitlines() if line.startswith(f"| `{case.name}` |"))
        assert row.count(" no ") == len(FAMILIES) - len(case.families)
