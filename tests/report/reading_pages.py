"""A page as a program reads it: its text, its scripts, what its elements ask for, and the figures of its plots."""

import json
import re
from html.parser import HTMLParser
from typing import Any

COLOURED = re.compile(r"color(scale)?$")


class Page(HTMLParser):
    """The parts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif not self._open or self._open[-1] != "style":
            self._words.append(data)

    @property
    def text(self) -> str:
        """What a person reads, with single spaces."""
        return " ".join(" ".join(self._words).split())

    @property
    def policy(self) -> dict[str, list[str]]:
        """The page's Content-Security-Policy, by directive."""
        (given,) = (each for tag, each in self.elements if tag == "meta" and "http-equiv" in each)
        assert given["http-equiv"] == "Content-Security-Policy"
        return {name: rest for name, *rest in (part.split() for part in (given["content"] or "").split(";"))}

    @property
    def plots(self) -> dict[str, Any]:
        """Figures by their keys."""
        (found,) = (text for attributes, text in self.scripts if attributes.get("type") == "application/json")
        plots: dict[str, Any] = json.loads(found)
        return plots


def painted(value: Any, key: str = "") -> Any:
    """A figure with some colour in place of the names of the page's own."""
    if isinstance(value, list):
        return [painted(each, key) for each in value]
    if isinstance(value, dict):
        return {name: painted(each, name) for name, each in value.items()}
    named = isinstance(value, str) and value.startswith("--") and COLOURED.search(key)
    return "#123456" if named else value
