"""Check that generated files are what their sources give: `python -m tests.check_generated`."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUBS = Path("isthmus/wire/gen")


def stale_stubs() -> list[str]:
    """Names of stubs that differ from what protoc makes of the contract now."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{STUBS}=protos/isthmus/v1"),
                *(f"{STUBS}/{path.name}" for path in sorted((ROOT / "protos/isthmus/v1").glob("*.proto"))),
                *(f"--python_out={scratch}", f"--pyi_out={scratch}", f"--grpc_python_out={scratch}"),
            ],
            cwd=ROOT,
            check=True,
        )
        made = sorted((Path(scratch) / STUBS).iterdir())
        return [path.name for path in made if path.read_text() != (ROOT / STUBS / path.name).read_text()]


def main() -> None:
    """Exit non-zero, saying what to run, if anything is stale."""
    stale = stale_stubs()
    if stale:
        sys.exit(f"{', '.join(stale)} in {STUBS} are not made from protos/ as it stands; run `make proto`")


if __name__ == "__main__":
    main()
