"""How much longer a sealed file takes than a plain one: `python -m benchmarks.sealing [FOLDER]`.

Knows 100 MB of random bytes and two ways to write and read them; each alternates with the other, so that both meet the
same machine. Writing includes waiting for the disk, as every file of a run does; it is also timed on memory alone.
"""

import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.durable import write_whole
from isthmus.trust.sealing import Seal

BYTES = 100_000_000
ROUNDS = 9
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where there is no disk to wait for)


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Median seconds, plain and sealed, of writing and of reading a file in `folder`."""
    content, seal, plain, sealed = secrets.token_bytes(BYTES), Seal.new(), folder / "plain", folder / "sealed"
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "write": (lambda: write_whole(plain, content), lambda: seal.write(sealed, "file", [content])),
        "read": (plain.read_bytes, lambda: seal.read(sealed, "file")),
    }
    found = {}
    for name, (one, other) in ways.items():
        pairs = [(seconds(one), seconds(other)) for _ in range(ROUNDS + 1)][1:]
        found[name] = (statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs))
    return found


def main() -> None:
    """Print a table."""
    places = [Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()), SHARED_MEMORY]
    print(f"100 MB, medians of {ROUNDS}\n| where | | plain, s | sealed, s | ratio |\n|---|---|---|---|---|")
    for place in filter(Path.is_dir, places):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            for name, (plain, sealed) in measured(Path(folder)).items():
                print(f"| {place} | {name} | {plain:.3f} | {sealed:.3f} | {sealed / plain:.2f} |")


if __name__ == "__main__":
    main()
