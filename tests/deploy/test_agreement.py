"""Files agree: ports, paths, users and times are the same wherever they are, and no more is open than is said."""

import json
from itertools import pairwise
from typing import Any

import pytest
import yaml

from cloud_node.config import ServeConfig
from isthmus.settings import read_settings
from tests.deploy.places import GRPC, STATUS
from tests.deploy.written import (
    DEPLOY,
    compose,
    containers,
    images,
    objects,
    pod_templates,
    setting,
    simple,
    the,
    words_of,
)

SERVICES: dict[str, Any] = compose({})["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("isthmus-")}
PODS = {f"{name} {number}": pod for number, (name, pod) in enumerate(pod_templates())}
NODES = [("Deployment", "isthmus-cloud"), ("Deployment", "isthmus-front-end")]
CLOUD_IMAGES = ("isthmus-cloud", "isthmus-cloud-cuda", "isthmus-ray")


def flags(words: list[str]) -> dict[str, str]:
    """The flags of a command that has `--name value` or `--name=value`; of repeated ones the last."""
    joined = " ".join(words).replace("=", " ").split()
    return {name: value for name, value in pairwise(joined) if name.startswith("--")}


def serving(name: str) -> dict[str, Any]:
    """What the node of that name is told, from its flags and its settings file."""
    if name == "compose":
        return flags(OURS["cloud"]["command"])
    if name == "isthmus-cloud.service":
        file = DEPLOY / "systemd/cloud.yaml"
    else:
        (*_, words) = simple(words_of(the("Deployment", name)["spec"]["template"]["spec"]["containers"][0]))
        if "--config" not in words:
            return flags(words)
        file = DEPLOY / "kubernetes/serve.yaml"
    settings = read_settings(ServeConfig, file, {}).model_dump(mode="json", exclude_none=True)
    return {f"--{key.replace('_', '-')}": str(value) for key, value in settings.items()}


@pytest.mark.parametrize("name", ["compose", "isthmus-cloud", "isthmus-front-end", "isthmus-cloud.service"])
def test_every_node_listens_at_the_same_ports_and_logs_json(name: str) -> None:
    told = serving(name)
    assert told["--listen"] == f"0.0.0.0:{GRPC}"
    assert told["--status-port"] == str(STATUS)
    assert told["--log-format"] == "json"
    assert told["--certs"]


def test_the_status_port_leaves_loopback_in_containers_alone() -> None:
    for name in ("compose", "isthmus-cloud", "isthmus-front-end"):
        assert serving(name)["--status-host"] == serving(name)["--listen"].partition(":")[0], name
    assert "--status-host" not in serving("isthmus-cloud.service")


def test_images_services_policies_and_scrapers_name_those_ports() -> None:
    assert {name: images()[name].ports for name in images()} == {
        name: {GRPC, STATUS} if name in CLOUD_IMAGES else set() for name in images()
    }
    for kind, name in NODES:
        pod = the(kind, name)["spec"]["template"]
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports == {"grpc": GRPC, "status": STATUS}
        assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(STATUS)
        (service,) = the("Service", name)["spec"]["ports"]
        assert (service["port"], service["targetPort"]) == (GRPC, "grpc")
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"cloud:{STATUS}"]}]


def test_outside_loopback_compose_publishes_grpc_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert [port for port in published if not port.startswith("127.0.0.1:")] == [f"{GRPC}:{GRPC}"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_of_compose_writes_its_volumes_alone(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    writable = {mount["target"] for mount in service["volumes"] if not mount.get("read_only")}
    edges = {"/cache", "/runs"}
    rest = {"cloud": {"/cache"}, "prometheus": {"/prometheus"}, "grafana": {"/var/lib/grafana"}}
    assert writable == rest.get(name, edges)


def test_the_edges_of_compose_see_nothing_of_each_other_and_none_sees_the_authority() -> None:
    sources = {name: {mount["source"] for mount in OURS[name]["volumes"]} for name in OURS}
    assert not sources["edge-a"] & sources["edge-b"]
    assert not (sources["edge-a"] | sources["edge-b"]) & sources["cloud"]
    mounted = set().union(*sources.values())
    assert "./site/certs" not in mounted
    assert not [source for source in mounted if "authority" in source]


def test_services_wait_for_the_node_and_share_a_network_with_what_they_call() -> None:
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}
    for edge in ("edge-a", "edge-b"):
        assert OURS[edge]["depends_on"] == {"cloud": {"condition": "service_healthy"}}
        assert networks[edge] == {"line"}
        assert f"--server=cloud:{GRPC}" in OURS[edge]["command"]
    assert networks["cloud"] == {"line", "watching"}
    assert networks["prometheus"] == networks["grafana"] == {"watching"}
    volumes = {mount["source"] for each in SERVICES.values() for mount in each["volumes"] if mount["type"] == "volume"}
    assert volumes == set(compose({})["volumes"])


def test_grafana_finds_its_data_and_its_dashboard_where_they_are_mounted() -> None:
    folder = DEPLOY / "grafana"
    targets = {mount["source"]: mount["target"] for mount in SERVICES["grafana"]["volumes"]}
    assert targets["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert json.loads((folder / "dashboard.json").read_text())["panels"]
    (sources,) = [yaml.safe_load(path.read_text()) for path in (folder / "provisioning/datasources").glob("*.yaml")]
    assert [source["url"] for source in sources["datasources"]] == ["http://prometheus:9090"]
    (boards,) = [yaml.safe_load(path.read_text()) for path in (folder / "provisioning/dashboards").glob("*.yaml")]
    (provider,) = boards["providers"]
    assert targets["./grafana/dashboard.json"].startswith(provider["options"]["path"])


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_what_a_restricted_namespace_admits(name: str) -> None:
    assert the("Namespace", "isthmus")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = PODS[name]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(PODS[name]):
        uid, _, gid = images()[container["image"].partition(":")[0]].all("USER")[-1].partition(":")
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(uid), int(gid))
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        resources = container["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= {each["name"] for each in pod["volumes"]}


def test_only_what_serves_edges_mounts_the_servers_keys() -> None:
    holders = [
        name
        for name, pod in PODS.items()
        for volume in pod["spec"].get("volumes", [])
        if volume.get("secret") == {"secretName": "isthmus-server"}
    ]
    assert {name.split()[0] for name in holders} == {f"{kind}/{name}" for kind, name in NODES}
    for kind, name in NODES:
        spec = the(kind, name)["spec"]["template"]["spec"]
        at = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert serving(name)["--certs"] == at["certs"]
        assert "secret" not in at
        assert serving(name)["--model"].startswith(f"{at['models']}/")


@pytest.mark.parametrize(("kind", "name"), NODES)
def test_a_node_is_given_the_time_that_it_takes_to_finish(kind: str, name: str) -> None:
    pod = the(kind, name)["spec"]["template"]["spec"]
    first = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > first + float(serving(name)["--grace"])


def test_compose_and_systemd_give_it_too() -> None:
    assert OURS["cloud"]["stop_grace_period"] == "45s"
    assert float(serving("compose")["--grace"]) < 45
    assert float(serving("isthmus-cloud.service")["--grace"]) < float(
        setting("isthmus-cloud.service", "TimeoutStopSec")
    )


def test_memory_holds_what_a_node_may_keep() -> None:
    container = the("Deployment", "isthmus-cloud")["spec"]["template"]["spec"]["containers"][0]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
    assert int(serving("isthmus-cloud")["--activation-budget"]) < limit


@pytest.mark.parametrize("name", [name for _, name in NODES])
def test_edges_reach_grpc_alone_and_a_node_calls_nobody(name: str) -> None:
    spec = the("NetworkPolicy", name)["spec"]
    pod = the("Deployment", name)["spec"]["template"]
    assert spec["podSelector"]["matchLabels"] == pod["metadata"]["labels"]
    assert the("Service", name)["spec"]["selector"] == pod["metadata"]["labels"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    anyone, monitoring, *others = spec["ingress"]
    assert anyone == {"ports": [{"port": "grpc", "protocol": "TCP"}]}
    assert monitoring["ports"] == [{"port": "status", "protocol": "TCP"}]
    assert [list(each) for each in monitoring["from"]] == [["namespaceSelector"]]
    ray = {"podSelector": {"matchLabels": the("NetworkPolicy", "isthmus-ray")["spec"]["podSelector"]["matchLabels"]}}
    of_ray = name == "isthmus-front-end"
    assert others == [{"from": [ray]}] * of_ray
    *inside, names = spec["egress"]
    assert inside == [{"to": [ray]}] * of_ray
    assert {port["port"] for port in names["ports"]} == {53}


def test_ray_is_reached_by_its_own_pods_and_by_nobody_without_the_token() -> None:
    cluster = the("RayCluster", "isthmus")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    front_end = the("Deployment", "isthmus-front-end")["spec"]["template"]
    environment = {each["name"]: each for each in front_end["spec"]["containers"][0]["env"]}
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    token = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert token == {"name": cluster["metadata"]["name"], "key": "auth_token"}
    labels = cluster["spec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    for policy, kept in (("isthmus-ray", labels), ("isthmus-front-end", front_end["metadata"]["labels"])):
        assert the("NetworkPolicy", policy)["spec"]["podSelector"]["matchLabels"] == kept
    script = words_of(front_end["spec"]["containers"][0])[-1]
    assert f"--address={cluster['metadata']['name']}-head-svc:6379" in script


def test_workers_are_as_many_as_stages_of_replicas() -> None:
    told, group = serving("isthmus-front-end"), the("RayCluster", "isthmus")["spec"]["workerGroupSpecs"][0]
    least, most = map(int, told["--replicas"].split(":"))
    assert (group["minReplicas"], group["maxReplicas"]) == (int(told["--stages"]) * least, int(told["--stages"]) * most)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert told["--device"] == "cuda"


def test_a_disruption_takes_one_node_at_a_time_of_those_that_there_are() -> None:
    budget, deployment = the("PodDisruptionBudget", "isthmus-cloud")["spec"], the("Deployment", "isthmus-cloud")["spec"]
    assert budget["selector"] == deployment["selector"]
    assert budget["maxUnavailable"] < deployment["replicas"]


def test_everything_of_kubernetes_is_in_one_namespace() -> None:
    assert {each["metadata"].get("namespace", "isthmus") for _, each in objects()} == {"isthmus"}
