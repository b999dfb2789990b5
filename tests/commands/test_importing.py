"""While libraries are imported no garbage is looked for; afterwards it is, whatever came of the import."""

import gc
import subprocess
import sys

from isthmus.command import importing
from tests.harness import ENVIRONMENT

PROGRAM = """
import gc
from contextlib import suppress
from isthmus.command import importing

with suppress(ImportError), importing():
    told = [gc.isenabled()]
    import none_such
print(*told, gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_what_was_imported_is_passed_over_and_later_garbage_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_nothing_changes_where_torch_is_there_already() -> None:
    assert "torch" in sys.modules
    before = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
