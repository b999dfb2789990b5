"""What Prometheus warns of is what a node tells, in rules that Prometheus reads where compose mounts them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import yaml

from isthmus.errors import catalogue
from isthmus.trust import certificates
from tests.deploy.written import DEPLOY, README, compose, monitor, rules
from tests.harness import serving
from tests.watching.reading import Series, StatusPort

DURATION = {"type": "string", "pattern": r"^\d+[smhd]$"}
TEXT = {"type": "string", "minLength": 1}
RULE = {
    "type": "object",
    "required": ["alert", "expr", "for", "labels", "annotations"],
    "additionalProperties": False,
    "properties": {
        "alert": {"type": "string", "pattern": "^Isthmus[A-Za-z]+$"},
        "expr": TEXT,
        "for": DURATION,
        "labels": {
            "type": "object",
            "required": ["severity"],
            "additionalProperties": False,
            "properties": {"severity": {"enum": ["critical", "warning"]}},
        },
        "annotations": {
            "type": "object",
            "required": ["summary", "description"],
            "additionalProperties": False,
            "properties": {"summary": TEXT, "description": TEXT},
        },
    },
}
GROUP = {
    "type": "object",
    "required": ["name", "rules"],
    "additionalProperties": False,
    "properties": {"name": TEXT, "rules": {"type": "array", "minItems": 1, "items": RULE}},
}
RULES_FILE = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {"groups": {"type": "array", "minItems": 1, "items": GROUP}},
}
"""What Prometheus documents of a file of alerting rules, as far as we use it; anything else is refused."""


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\bisthmus_\w+", query))


@pytest.fixture(scope="module")
def told(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Series]:
    """What a node with a certificate tells of itself once it is ready."""
    place = tmp_path_factory.mktemp("alerts")
    certificates.init_authority(place / "owner")
    flags = ("--cut", "1:1", "--certs", str(place / "owner/server"), "--status-port", "0")
    with serving(tiny_models["llama"], *flags, cache=place / "cache") as server:
        yield StatusPort.of(server).series()


def test_the_file_is_one_of_alerting_rules() -> None:
    written = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    jsonschema.validate(written, RULES_FILE)
    assert sum(len(group["rules"]) for group in written["groups"]) == len(rules())  # each has a name of its own
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {"groups": [{"name": "isthmus", "rules": [{"alert": "IsthmusOdd", "expr": "1"}]}]}, RULES_FILE
        )


def test_every_figure_that_a_rule_asks_for_is_one_that_a_node_tells(told: Series) -> None:
    exported = {name for name, _ in told}
    for alert, rule in rules().items():
        asked = names_in(rule["expr"])
        assert asked <= exported, alert
        assert asked or rule["expr"].startswith("up{"), alert


def test_rules_name_only_labels_that_the_figures_have(told: Series) -> None:
    labels: dict[str, set[str]] = {}
    for name, carried in told:
        labels.setdefault(name, {"instance", "job"}).update(label for label, _ in carried)
    for rule in rules().values():
        query = rule["expr"]
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        for name in names_in(query):
            assert grouped <= labels[name], query
        for name, chosen in re.findall(r"(isthmus_\w+)\{(\w+)", query):
            assert chosen in labels[name], query
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= {"instance"}


def test_errors_that_are_left_out_are_of_the_catalogue_and_an_internal_one_is_not_left_out() -> None:
    left_out = {
        kind
        for found in re.findall(r'kind!~"([^"]+)"', rules()["IsthmusManyErrors"]["expr"])
        for kind in found.split("|")
    }
    assert left_out <= set(catalogue())
    assert "internal" not in left_out


def test_the_readme_explains_each_alert() -> None:
    assert re.findall(r"^\| `(Isthmus\w+)` \|", README.read_text(), re.MULTILINE) == list(rules())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_reads_the_rules_and_its_settings() -> None:
    check = [str(shutil.which("promtool")), "check"]
    for asked in (["rules", "alerts.yml"], ["config", "prometheus.yml"]):
        done = subprocess.run([*check, *asked], cwd=DEPLOY, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_the_monitor_finds_the_rules_where_compose_mounts_them() -> None:
    service = compose({})["services"]["prometheus"]
    mounted = {mount["target"]: mount for mount in service["volumes"]}
    settings = next(PurePosixPath(target) for target in mounted if target.endswith("/prometheus.yml"))
    for file in monitor()["rule_files"]:  # as Prometheus does: from the folder of its settings
        mount = mounted[str(settings.parent / file)]
        assert mount["read_only"] is True
        assert (DEPLOY / mount["source"]).samefile(DEPLOY / "alerts.yml")


def test_the_node_that_may_be_down_is_the_job_that_is_asked() -> None:
    (job,) = monitor()["scrape_configs"]
    assert f'up{{job="{job["job_name"]}"}} == 0' == rules()["IsthmusNodeDown"]["expr"]


def test_an_alert_waits_longer_than_the_monitor_takes_to_ask_twice() -> None:
    every = int(monitor()["global"]["scrape_interval"].removesuffix("s"))
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    assert all(int(rule["for"][:-1]) * seconds[rule["for"][-1]] >= 2 * every for rule in rules().values())
