"""The wheel: what is in it, and that its console commands start where nothing else of this project is."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.harness import ENVIRONMENT

ROOT = Path(__file__).parents[2]
PACKAGES = ("isthmus", "cloud_node", "edge_client", "emulator")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, with the build tools that are installed here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with this wheel in it, and with our dependencies in reach but not our sources."""
    place = tmp_path_factory.mktemp("clean")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = place.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but .pth files in it are not read: an editable install stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def test_the_wheel_holds_the_packages_with_their_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in ours} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= ours
    stubs = ("backbone_pb2.py", "backbone_pb2.pyi", "backbone_pb2_grpc.py")
    assert {f"isthmus/wire/gen/{name}" for name in stubs} <= ours
    expected = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert expected <= ours
    assert not [name for name in names if "test" in name]
    assert [name for name in names if name.endswith("/LICENSE")]


@pytest.mark.parametrize("command", ["edge_client", "cloud_node"])
def test_its_console_commands_start(command: str, clean: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [clean / command, "--help"], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"Usage: {command}" in done.stdout


def test_what_starts_is_the_wheel(clean: Path, tmp_path: Path) -> None:
    program = (
        "import isthmus, cloud_node, edge_client; print(isthmus.__file__, cloud_node.__file__, edge_client.__file__)"
    )
    done = subprocess.run(
        [clean / "python", "-c", program], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(path).is_relative_to(clean.parent) for path in done.stdout.split())
