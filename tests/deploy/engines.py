"""`docker compose` and `kubectl` as far as the README types them: flags by their references, and what they name exists.

Knows the flags that are used, and refuses others; asks no container engine and no cluster.
"""

from argparse import ArgumentParser
from typing import NoReturn

from tests.deploy.written import DEPLOY, ROOT, compose, the


class Words(ArgumentParser):
    """A command line whose error is an exception that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _of_docker() -> Words:
    # https://docs.docker.com/reference/cli/docker/compose/ and .../up/
    docker = Words("docker", allow_abbrev=False)
    project = docker.add_subparsers(required=True).add_parser("compose")
    project.add_argument("-f", "--file", required=True)
    project.add_argument("--profile")
    up = project.add_subparsers(required=True).add_parser("up")
    for flag in ("--build", "--detach", "--force-recreate"):
        up.add_argument(flag, action="store_true")
    up.add_argument("services", nargs="*")
    return docker


def _of_kubectl() -> Words:
    # https://kubernetes.io/docs/reference/kubectl/generated/
    kubectl = Words("kubectl", allow_abbrev=False)
    verbs = kubectl.add_subparsers(dest="verb", required=True)
    apply = verbs.add_parser("apply")
    given = apply.add_mutually_exclusive_group(required=True)
    given.add_argument("-f", "--filename", action="append", default=[])
    given.add_argument("-k", "--kustomize", action="append", default=[])
    secret = verbs.add_parser("create").add_subparsers(required=True).add_parser("secret")
    generic = secret.add_subparsers(required=True).add_parser("generic")
    generic.add_argument("secret")
    generic.add_argument("--from-file", required=True)
    generic.add_argument("--dry-run", choices=("none", "server", "client"), default="none")
    generic.add_argument("--output", choices=("json", "yaml", "name"))
    restart = verbs.add_parser("rollout").add_subparsers(required=True).add_parser("restart")
    restart.add_argument("resource")
    for namespaced in (generic, restart):
        namespaced.add_argument("--namespace", required=True)
    return kubectl


DOCKER, KUBECTL = _of_docker(), _of_kubectl()


def docker(words: list[str]) -> None:
    """Read what follows `docker`; its file is ours, and the services are ones that it starts.

    Raises:
        ValueError: a flag that is not used here, or that there is not.
    """
    given = DOCKER.parse_args(words)
    assert (ROOT / given.file).samefile(DEPLOY / "compose.yaml")
    services = compose({})["services"]
    for name in given.services:
        assert services[name].get("profiles", [given.profile]) == [given.profile], name


def kubectl(words: list[str]) -> None:
    """Read what follows `kubectl`; files are there, and so is the object in its namespace.

    Raises:
        ValueError: a flag that is not used here, or that there is not.
    """
    given = KUBECTL.parse_args(words)
    if given.verb == "apply":
        assert all((ROOT / file).is_file() for file in given.filename if file != "-")  # `-`: from a pipe
        assert all((ROOT / folder / "kustomization.yaml").is_file() for folder in given.kustomize)
        return
    assert the("Namespace", given.namespace)
    if given.verb == "rollout":
        kind, _, name = given.resource.partition("/")
        assert the(kind.capitalize(), name)["metadata"]["namespace"] == given.namespace
    else:
        assert given.secret in {secret_of("isthmus-cloud"), secret_of("isthmus-front-end")}


def secret_of(deployment: str) -> str:
    """The name of the Secret that a Deployment mounts."""
    volumes = the("Deployment", deployment)["spec"]["template"]["spec"]["volumes"]
    (name,) = [str(volume["secret"]["secretName"]) for volume in volumes if "secret" in volume]
    return name
