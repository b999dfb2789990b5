"""Manifests are what their readers take: by schemas of Kubernetes and compose, as KubeRay documents it, by systemd."""

import json
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.places import of_host
from tests.deploy.written import DEPLOY, compose, objects, the, unit

KUBERNETES = "1.37"
UNITS = sorted(path.name for path in (DEPLOY / "systemd").glob("*.service"))
OURS = [(name, each) for name, each in objects() if each["apiVersion"] != "ray.io/v1"]

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": STRINGS, "template": {"type": "object"}}
# What we use of a RayCluster, by the names and types of KubeRay's API reference; anything else is refused.
RAY_CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}},
        },
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": {"type": "integer"},
                "securityContext": {"type": "object"},
            },
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "additionalProperties": False,
            "properties": GROUP,
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "minReplicas", "maxReplicas", "template"],
                "additionalProperties": False,
                "properties": GROUP
                | {"groupName": {"type": "string", "pattern": "^[a-z0-9-]+$"}}
                | {f"{name}eplicas": {"type": "integer", "minimum": 0} for name in ("r", "minR", "maxR")},
            },
        },
    },
}


def is_valid(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "manifest"), OURS, ids=[f"{name}-{each['kind']}" for name, each in OURS])
def test_a_kubernetes_object_has_only_fields_that_there_are(name: str, manifest: dict[str, Any]) -> None:
    is_valid(manifest)
    with pytest.raises(kubernetes_validate.ValidationError):
        is_valid(manifest | {"speck": 1})


def test_a_ray_cluster_has_only_settings_that_kuberay_documents_and_its_pods_are_pods() -> None:
    spec = the("RayCluster", "isthmus")["spec"]
    jsonschema.validate(spec, RAY_CLUSTER)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        is_valid(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "one"}, "template": group["template"]}
        )


def test_the_compose_file_is_one() -> None:
    place = distribution("check-jsonschema").locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    schema = json.loads(Path(str(place)).read_text())
    jsonschema.validate(compose({}), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"cloud": {"ports": 7070, "volums": []}}}, schema)


def test_a_kustomization_names_files_that_there_are_and_the_config_map_that_the_node_mounts() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "images"}
    assert set(kustomization) == known
    (generated,) = kustomization["configMapGenerator"]
    for name in (*kustomization["resources"], *generated["files"]):
        assert (DEPLOY / "kubernetes" / name).is_file(), name
    left_out = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - set(kustomization["resources"])
    assert left_out == {"kustomization.yaml", "serve.yaml", "fetch-model.yaml"}
    pod = the("Deployment", "isthmus-cloud")["spec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": generated["name"]}} in pod["volumes"]
    assert kustomization["images"][0]["name"] == pod["containers"][0]["image"].partition(":")[0]


def test_the_monitor_asks_in_keys_that_prometheus_knows() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert set(settings) == {"global", "rule_files", "scrape_configs"}
    assert set(settings["global"]) <= {"scrape_interval", "scrape_timeout", "evaluation_interval"}
    for each in settings["scrape_configs"]:
        assert set(each) <= {"job_name", "metrics_path", "scheme", "static_configs"}
        assert all(set(group) == {"targets"} for group in each["static_configs"])


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_confines_what_it_runs(name: str) -> None:
    settings = {(section, key): value for section, key, value in unit(name)}
    confined = ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "RestrictNamespaces")
    assert {settings["Service", key] for key in confined} == {"yes"}
    assert settings["Service", "ProtectSystem"] == "strict"
    assert settings["Service", "CapabilityBoundingSet"] == ""
    assert settings["Service", "User"] not in ("", "root")
    assert settings["Install", "WantedBy"] == "multi-user.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_knows_every_setting_of_a_unit(name: str, tmp_path: Path) -> None:
    unit_file = of_host(tmp_path).copy(DEPLOY / "systemd" / name, tmp_path / name.replace("@", "@reviews"))

    def said() -> str:
        command = ["systemd-analyze", "verify", "--man=no", str(unit_file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr

    assert said() == ""
    unit_file.write_text(unit_file.read_text().replace("[Service]", "[Service]\nProtectNothing=yes"))
    assert "ProtectNothing" in said()
