"""An environment in which nothing is installed but what `pip install '.[edge]'` brings: a venv made of links.

Knows pyproject.toml and the distributions that are installed here. Nothing is downloaded: each file that a distribution
of the closure recorded is linked, and of the project's own packages those that an edge needs.
"""

import re
import tomllib
import venv
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OWN = ("isthmus", "edge_client")
"""Of the project's packages; neither `cloud_node` nor `emulator` may be needed on an edge."""


def requirements(extra: str) -> list[Requirement]:
    """What the project asks for when it is installed with `extra`; extras of its own in it are followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in project["optional-dependencies"][extra]]
    own = [Requirement(line) for line in project["dependencies"]]
    nested = [
        more for one in asked if one.name == project["name"] for name in one.extras for more in requirements(name)
    ]
    return [*own, *nested, *(one for one in asked if one.name != project["name"])]


def closure(extra: str) -> dict[str, Distribution]:
    """Every distribution that installing with `extra` brings, by canonical name.

    Raises:
        PackageNotFoundError: one of them is not installed here.
    """
    found: dict[str, Distribution] = {}
    pending, seen = _wanted(requirements(extra), ()), set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = distribution(name)
            pending += _wanted(map(Requirement, found[name].requires or ()), extras)
    return found


def importable_beyond(extra: str) -> set[str]:
    """Names of top-level modules that are installed here and that `extra` does not bring."""
    brought = closure(extra)
    return {
        module
        for module, owners in packages_distributions().items()
        if re.fullmatch(r"[A-Za-z]\w*", module) and not {canonicalize_name(owner) for owner in owners} & set(brought)
    } - set(OWN)


def make(directory: Path) -> Path:
    """Make the environment; returns its interpreter."""
    venv.create(directory, with_pip=False, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    for found in closure("edge").values():
        _link(found, packages)
    for name in OWN:
        (packages / name).symlink_to(ROOT / name)
    return directory / "bin" / "python"


def _link(found: Distribution, packages: Path) -> None:
    for file in _files(found):
        place = packages / file
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(Path(str(found.locate_file(file))))


def _files(found: Distribution) -> Iterator[Path]:
    """The recorded files that a module may be or may read: no scripts, no headers."""
    for file in map(Path, found.files or ()):
        if ".." not in file.parts and "include" not in file.parts:
            yield file


def _wanted(asked: Iterable[Requirement], extras: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Name and extras of those that apply on this machine to who was installed with `extras`."""
    return [
        (canonicalize_name(one.name), tuple(sorted(one.extras)))
        for one in asked
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]
