"""The files of deploy/ as data: images, services of compose, Kubernetes objects, units, alerts, the README's commands.

Knows their syntax; judges nothing and runs nothing.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
README = DEPLOY / "README.md"


@dataclass(frozen=True)
class Image:
    """A Dockerfile: its stages, each a list of instructions with their arguments, the first of which is FROM."""

    stages: list[list[tuple[str, str]]]

    @classmethod
    def read(cls, path: Path) -> "Image":
        """Comments off and continued lines joined."""
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        stages: list[list[tuple[str, str]]] = []
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            name, _, rest = line.partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append((name, " ".join(rest.split())))
        return cls(stages)

    @property
    def instructions(self) -> list[tuple[str, str]]:
        """Those of all stages."""
        return [each for stage in self.stages for each in stage]

    def all(self, name: str) -> list[str]:
        """Arguments of the instructions `name` of the stage that is shipped."""
        return [rest for each, rest in self.stages[-1] if each == name]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        return dict(pair.split("=", 1) for rest in self.all("ENV") for pair in shlex.split(rest))

    @property
    def entrypoint(self) -> list[str]:
        """Words of ENTRYPOINT."""
        return [word for rest in self.all("ENTRYPOINT") for word in json.loads(rest)]

    @property
    def command(self) -> list[str]:
        """Words of CMD."""
        return [word for rest in self.all("CMD") for word in json.loads(rest)]

    @property
    def health(self) -> list[str]:
        """Words of HEALTHCHECK."""
        return [word for rest in self.all("HEALTHCHECK") for word in json.loads(rest.partition("CMD ")[2])]

    @property
    def ports(self) -> set[int]:
        """What EXPOSE names."""
        return {int(port) for rest in self.all("EXPOSE") for port in rest.split()}


@cache
def images() -> dict[str, Image]:
    """The Dockerfiles by what their images are called, `isthmus-cloud` and so on."""
    return {f"isthmus-{path.suffix[1:]}": Image.read(path) for path in sorted(DEPLOY.glob("Dockerfile.*"))}


def compose(environment: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml with `${NAME:-default}` put in."""

    def value(found: re.Match[str]) -> str:
        return environment.get(found[1], found[2])

    written = re.sub(r"\$\{(\w+):-([^}]*)\}", value, (DEPLOY / "compose.yaml").read_text())
    return dict(yaml.safe_load(written))


@cache
def objects() -> list[tuple[str, dict[str, Any]]]:
    """Kubernetes objects, each with the file that it stands in."""
    found = []
    for path in sorted([*(DEPLOY / "kubernetes").glob("*.yaml"), *(DEPLOY / "kuberay").glob("*.yaml")]):
        found += [(path.name, each) for each in yaml.safe_load_all(path.read_text()) if "kind" in each]
    return [(name, each) for name, each in found if each["kind"] != "Kustomization"]


def the(kind: str, name: str) -> dict[str, Any]:
    """The Kubernetes object of that kind and name."""
    (found,) = [each for _, each in objects() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod_templates() -> list[tuple[str, dict[str, Any]]]:
    """Every pod that is described, with the name of what describes it."""
    found = []
    for _, each in objects():
        spec, name = each.get("spec", {}), f"{each['kind']}/{each['metadata']['name']}"
        groups = [
            spec,
            *([spec["headGroupSpec"]] if "headGroupSpec" in spec else []),
            *spec.get("workerGroupSpecs", []),
        ]
        found += [(name, group["template"]) for group in groups if "template" in group]
    return found


def containers(template: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The containers of a pod, those that only prepare it first."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def words_of(container: Mapping[str, Any]) -> list[str]:
    """What a container runs: its own words where it has them, else its image's; empty where KubeRay decides."""
    image = images()[container["image"].partition(":")[0]]
    command = container.get("command", image.entrypoint)
    return [*command, *container.get("args", [] if "command" in container else image.command)]


@cache
def rules() -> dict[str, Any]:
    """The rules of alerts.yml by the names of their alerts."""
    written = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    return {rule["alert"]: rule for group in written["groups"] for rule in group["rules"]}


@cache
def monitor() -> dict[str, Any]:
    """What prometheus.yml sets."""
    return dict(yaml.safe_load((DEPLOY / "prometheus.yml").read_text()))


@cache
def unit(name: str) -> list[tuple[str, str, str]]:
    """A systemd unit as sections, keys and values."""
    section, found = "", []
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.append((section, key, value))
    return found


def setting(unit_name: str, key: str) -> str:
    """The one value of a unit's key."""
    (value,) = [value for _, each, value in unit(unit_name) if each == key]
    return value


def told() -> list[list[str]]:
    """The commands that the README tells to type, comments off and continued lines joined."""
    return [words for block in _blocks("sh") for words in block]


def renewals() -> list[list[list[str]]]:
    """The commands of each renewal of certificates, compose's and Kubernetes'; those of a pipe one after another."""
    return _blocks("shell")


def _blocks(fence: str) -> list[list[list[str]]]:
    found = []
    for block in re.findall(rf"```{fence}\n(.*?)```", README.read_text(), re.DOTALL):
        lines = block.replace("\\\n", " ").replace(" | ", "\n").splitlines()
        found.append([words for line in lines if (words := shlex.split(line, comments=True))])
    return found


def simple(words: list[str]) -> list[list[str]]:
    """A command, or the commands of an `sh -c` that run one after another."""
    if words[:2] != ["sh", "-c"]:
        return [words]
    parts = [shlex.split(part) for part in words[2].split("&&")]
    return [part[1:] if part[0] == "exec" else part for part in parts]


def commands() -> dict[str, list[str]]:
    """Every command that a file of deploy/ runs, by where it stands; only simple ones."""
    found: dict[str, list[list[str]]] = {}
    for name, image in images().items():
        found[name] = [[*image.entrypoint, *image.command]]
        found[f"{name} health"] = [image.health]
    for name, service in compose({})["services"].items():
        ours = images().get(service["image"].partition(":")[0])
        entrypoint = service.get("entrypoint", ours.entrypoint if ours else [])
        found[f"compose {name}"] = [[*entrypoint, *service.get("command", [])]]
        found[f"compose {name} health"] = [service.get("healthcheck", {}).get("test", [])[1:]]
    for name, template in pod_templates():
        for container in containers(template):
            found[f"{name} {container['name']}"] = simple(words_of(container))
    for path in sorted((DEPLOY / "systemd").glob("*.service")):
        found[path.name] = [shlex.split(setting(path.name, "ExecStart").replace("%i", "reviews"))]
    found |= {f"README {number}": [words] for number, words in enumerate(told())}
    found |= {f"README renewal {number}": block for number, block in enumerate(renewals())}
    return {f"{at} {number}": words for at, each in found.items() for number, words in enumerate(each) if words}
