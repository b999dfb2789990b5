"""The Grafana dashboard and the node speak of the same figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.watching.conftest import Watched

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
PARTS_OF_A_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def dashboard() -> Any:
    return json.loads((GRAFANA / "dashboard.json").read_text())


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_every_figure_is_on_a_panel_and_every_panel_is_of_figures_that_there_are(watched: Watched) -> None:
    asked = {name for query in queries() for name in re.findall(r"isthmus_\w+", query)}
    exported = {name for name, _ in watched.status.series()}
    assert asked <= exported
    families = {PARTS_OF_A_HISTOGRAM.sub("", name) for name in exported}
    assert {PARTS_OF_A_HISTOGRAM.sub("", name) for name in asked} == families
    assert all(name.startswith("isthmus_") for name in exported)


def test_queries_name_only_labels_that_the_figures_have(watched: Watched) -> None:
    labels: dict[str, set[str]] = {}
    for name, carried in watched.status.series():
        labels.setdefault(name, set()).update(label for label, _ in carried)
    for query in queries():
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        for name in re.findall(r"isthmus_\w+", query):
            assert grouped <= labels[name], query


def test_panels_do_not_overlap_and_have_titles_and_numbers_of_their_own() -> None:
    panels, taken = dashboard()["panels"], set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + right, place["y"] + down) for right in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for field in ("id", "title", "description"):
        assert len({panel[field] for panel in panels}) == len(panels), field


def test_brackets_in_queries_are_closed() -> None:
    for query in queries():
        assert [query.count(mark) for mark in "({["] == [query.count(mark) for mark in ")}]"], query


@pytest.mark.parametrize("name", ["datasources/prometheus.yaml", "dashboards/isthmus.yaml"])
def test_provisioning_files_are_of_the_version_that_grafana_reads(name: str) -> None:
    assert yaml.safe_load((GRAFANA / "provisioning" / name).read_text())["apiVersion"] == 1
