"""Images: what is installed in them, what cannot get into them, and as whom they run."""

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.deploy.written import DEPLOY, ROOT, Image, images, the

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"isthmus-cloud": {"cloud"}, "isthmus-edge": {"edge"}, "isthmus-ray": {"cloud", "ray"}}
EXTRAS["isthmus-cloud-cuda"] = {"cloud", "quantize"}
OURS = {"cloud_node", "edge_client", "emulator", "isthmus"}
every_image = pytest.mark.parametrize("name", images())


def installs(image: Image) -> list[list[str]]:
    """What each `pip install` names, quotes off."""
    runs = [rest for name, rest in image.instructions if name == "RUN" and "pip install" in rest]
    return [re.sub("'", "", rest.partition("pip install ")[2]).split() for rest in runs]


def requirements(extras: set[str]) -> set[str]:
    """The packages that the project names for itself with these extras."""
    named = PROJECT["dependencies"] + [each for extra in extras for each in PROJECT["optional-dependencies"][extra]]
    return {Requirement(each).name for each in named}


def test_there_is_an_image_for_each_use() -> None:
    assert set(images()) == set(EXTRAS)


@every_image
def test_an_image_installs_extras_that_there_are_and_the_torch_that_is_tested_with(name: str) -> None:
    named = [word for words in installs(images()[name]) for word in words]
    (ours,) = [word for word in named if word.startswith("/src")]
    assert set(re.findall(r"[\w-]+", ours.partition("[")[2])) == EXTRAS[name]
    assert EXTRAS[name] <= set(PROJECT["optional-dependencies"])
    (torch,) = [word for word in named if word.startswith("torch==")]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^TORCH +\?= {re.escape(torch)}$", makefile, re.MULTILINE)
    index = re.search(r"^TORCH_INDEX \?= (.+)$", makefile, re.MULTILINE)
    assert index is not None
    assert (index[1] in named) == (name in ("isthmus-cloud", "isthmus-edge"))


def test_an_edge_has_no_ray_and_no_server_in_it() -> None:
    cloud, edge = requirements({"cloud", "ray"}), requirements({"edge"})
    assert {"ray", "prometheus-client", "gguf"} <= cloud
    assert not {"ray", "prometheus-client", "gguf", "trl", "bitsandbytes"} & edge


def test_ray_is_of_one_version_in_its_image_its_manifest_and_the_package() -> None:
    image = images()["isthmus-ray"]
    (ray,) = [word for words in installs(image) for word in words if word.startswith("ray==")]
    version = ray.removeprefix("ray==")
    assert the("RayCluster", "isthmus")["spec"]["rayVersion"] == version
    (base,) = image.all("FROM")
    assert base == f"rayproject/ray:{version}-py311"
    (wanted,) = [each for each in PROJECT["optional-dependencies"]["ray"] if Requirement(each).name == "ray"]
    assert Requirement(wanted).specifier.contains(version)


@every_image
def test_a_base_is_pinned_and_of_a_python_that_the_project_takes(name: str) -> None:
    for stage in images()[name].stages:
        base = stage[0][1].split()[0]
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[\w-]+", base), base
        python = re.search(r"python:(3\.\d+)|-py(3)(\d+)$", base)
        assert python is not None
        assert tuple(map(int, (python[1] or f"{python[2]}.{python[3]}").split("."))) == (3, 11)
    assert PROJECT["requires-python"] == ">=3.11"


@every_image
def test_an_image_runs_as_a_user_that_is_not_root_by_number(name: str) -> None:
    uid, _, gid = images()[name].all("USER")[-1].partition(":")
    assert int(uid) > 0
    assert int(gid) > 0


@every_image
def test_nothing_secret_and_nothing_from_elsewhere_is_put_into_an_image(name: str) -> None:
    image = images()[name]
    assert not [each for each, _ in image.instructions if each in ("ADD", "ARG")]
    copied = [rest for each, rest in image.instructions if each == "COPY"]
    assert set(copied) <= {
        ". /src",
        "--chown=ray:users . /src",
        "--from=build /opt/isthmus /opt/isthmus",
        "--chmod=755 deploy/begin-or-resume /opt/isthmus/bin/begin-or-resume",
    }
    assert not [pair for pair in image.environment if re.search("KEY|SECRET|TOKEN$|PASSWORD", pair)]
    assert image.environment["HF_HUB_OFFLINE"] == "1"


def test_the_build_sees_the_sources_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {*OURS, "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "deploy/begin-or-resume"}
    assert all((ROOT / name).exists() for name in let_in)


def test_images_are_called_by_the_projects_version() -> None:
    written = "".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    named = set(re.findall(r"(isthmus-[\w-]+):(\d+\.[\w.]*)", written))
    assert named == {(name, PROJECT["version"]) for name in images()}
