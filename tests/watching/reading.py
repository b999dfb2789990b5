"""Reading a node's status port as Prometheus, a probe and a person's browser do."""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from tests.faults.training import wait_until
from tests.harness import Server

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Page:
    """An answer over HTTP."""

    code: int
    headers: dict[str, str]
    text: str


@dataclass(frozen=True)
class StatusPort:
    """The status port of a server."""

    url: str

    @classmethod
    def of(cls, server: Server) -> "StatusPort":
        """Where the log says that it is."""
        wait_until(lambda: "status page at http" in server.log, "the address of the status page")
        found = re.search(r"status page at (http://\S+)/", server.log)
        assert found is not None
        return cls(found[1])

    def get(self, path: str) -> Page:
        try:
            with urlopen(self.url + path, timeout=20) as answer:  # noqa: S310 (the test's own server)
                return Page(answer.status, dict(answer.headers), answer.read().decode())
        except HTTPError as refused:
            with refused:
                return Page(refused.code, dict(refused.headers), refused.read().decode())

    def series(self) -> Series:
        """Every series of /metrics."""
        return series_in(self.get("/metrics").text)

    def figures(self) -> Any:
        """What /status.json says."""
        return json.loads(self.get("/status.json").text)


def series_in(text: str) -> Series:
    """Prometheus' text as values by name and labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def total(series: Series, name: str, **labels: str) -> float:
    """The sum of a name's series that have these labels; there must be one."""
    wanted = {(label.rstrip("_"), value) for label, value in labels.items()}
    found = [value for (of, carried), value in series.items() if of == name and wanted <= carried]
    assert found, (name, labels)
    return sum(found)


def json_lines(server: Server) -> list[dict[str, Any]]:
    """The lines of the log, each of which is an object, without what the command itself prints."""
    lines = [line for line in server.lines if not line.startswith("cloud_node: ")]
    return [json.loads(line) for line in lines]
