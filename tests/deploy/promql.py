"""Prometheus' query language as far as alerts.yml speaks it, over figures that a test writes down.

Knows selectors, increase, rate, changes, histogram_quantile, `sum by`, `and`, `>`, `<`, `==`, `-`, `*` and time(), as
https://prometheus.io/docs/prometheus/latest/querying/ has them, and refuses anything else. These parts of it bind and
nest as Python's do, so Python parses. One thing is simpler: increase and rate are not stretched to the ends of their
range, and so leave out what grew between two askings.
"""

import ast
import operator
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Range = tuple[int, dict[Labels, list[float]]]  # values of the last so many seconds
Figures = Mapping[tuple[str, Labels], Sequence[tuple[float, float | None]]]
"""Samples by time, by name and labels; None where the node did not answer."""
LOOKBACK_S = 300  # unless the node did not answer since
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
COMPARISONS: dict[type, Any] = {ast.Eq: operator.eq, ast.Gt: operator.gt, ast.Lt: operator.lt}
MATCHERS: dict[str, Any] = {"=": operator.eq, "!~": lambda value, pattern: re.fullmatch(pattern, value) is None}
ARITHMETIC: dict[type, Any] = {ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(query: str, figures: Figures, at: float) -> Vector:
    """What the query gives at that time.

    Raises:
        ValueError, SyntaxError: it says what this file does not know.
    """
    return dict(_Reading(figures, at).of(_parsed(query)))


@cache
def _parsed(query: str) -> ast.expr:
    def selector(found: re.Match[str]) -> str:
        name, matchers, span = found.groups(default="")
        return f"select({name!r}, {matchers!r}, {span!r})" if matchers or span else name

    query = re.sub(r"(\w+)(?:\{(.*?)\})?(?:\[(\w+)\])?", selector, query)
    query = re.sub(r"\bsum by \(([^)]*)\) \(", lambda found: f"summed({found[1]!r}, ", query)
    return ast.parse(query, mode="eval").body


def seconds(duration: str) -> int:
    """Of a duration such as `15m`."""
    return int(duration[:-1]) * UNITS[duration[-1]]


class _Reading:
    """What parts of a query give at one time: a number, a vector or a range."""

    def __init__(self, figures: Figures, at: float) -> None:
        self._figures, self._at = figures, at
        self._functions = {"select": self._selected, "time": lambda: at, **FUNCTIONS}

    def of(self, node: ast.AST) -> Any:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                first, *rest = map(self.of, parts)
                return {labels: value for labels, value in first.items() if all(labels in each for each in rest)}
            case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in COMPARISONS:
                return _compared(COMPARISONS[type(sign)], self.of(left), self.of(right))
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in ARITHMETIC:
                return _computed(ARITHMETIC[type(sign)], self.of(left), self.of(right))
            case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if name in self._functions:
                return self._functions[name](*map(self.of, given))
            case ast.Name(id=name):
                return self._selected(name)
            case ast.Constant(value=value):
                return value
        raise ValueError(f"this is not evaluated here: {ast.unparse(node)}")

    def _selected(self, name: str, matchers: str = "", span: str = "") -> Vector | Range:
        until = partial(bisect_right, key=operator.itemgetter(0))
        within = seconds(span) if span else LOOKBACK_S
        chosen = {
            labels: [value for _, value in samples[until(samples, self._at - within) : until(samples, self._at)]]
            for (of, labels), samples in self._figures.items()
            if of == name and _match(dict(labels), matchers)
        }
        if span:
            return within, {labels: [one for one in values if one is not None] for labels, values in chosen.items()}
        return {labels: values[-1] for labels, values in chosen.items() if values and values[-1] is not None}


def _match(labels: Mapping[str, str], matchers: str) -> bool:
    read = re.findall(r'(\w+)(=|!~)"([^"]*)"(?:,|$)', matchers)
    if ",".join(f'{label}{sign}"{wanted}"' for label, sign, wanted in read) != matchers:
        raise ValueError(f"this is not evaluated here: {matchers}")
    return all(MATCHERS[sign](labels.get(label, ""), wanted) for label, sign, wanted in read)


def _compared(holds: Callable[..., bool], left: Vector, right: Vector | float) -> Vector:
    other = right if isinstance(right, dict) else dict.fromkeys(left, right)
    return {labels: value for labels, value in left.items() if labels in other and holds(value, other[labels])}


def _computed(compute: Callable[..., float], left: Any, right: Any) -> Any:
    if isinstance(right, dict):
        return {labels: compute(left, value) for labels, value in right.items()}
    if isinstance(left, dict):
        return {labels: compute(value, right) for labels, value in left.items()}
    return compute(left, right)


def _summed(names: str, vector: Vector) -> Vector:
    sums: Vector = defaultdict(float)
    for labels, value in vector.items():
        sums[frozenset(label for label in labels if label[0] in names.split(", "))] += value
    return dict(sums)


def _changes(of: Range) -> Vector:
    return {labels: sum(one != other for one, other in pairwise(values)) for labels, values in of[1].items() if values}


def _increase(of: Range) -> Vector:
    grown = {labels: [b - a if b >= a else b for a, b in pairwise(values)] for labels, values in of[1].items()}
    return {labels: sum(steps) for labels, steps in grown.items() if steps}


def _quantile(share: float, buckets: Vector) -> Vector:
    found: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in buckets.items():
        (bound,) = [label for label in labels if label[0] == "le"]
        found[labels - {bound}].append((float(bound[1]), count))
    return {labels: _placed(share, sorted(counts)) for labels, counts in found.items() if max(counts)[1] > 0}


def _placed(share: float, counts: Sequence[tuple[float, float]]) -> float:
    rank = share * counts[-1][1]
    place = next(place for place, (_, count) in enumerate(counts) if count >= rank)
    (low, below), (high, count) = [(0.0, 0.0), *counts][place], counts[place]
    return low if high == float("inf") else low + (high - low) * (rank - below) / (count - below)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "changes": _changes,
    "histogram_quantile": _quantile,
    "increase": _increase,
    "rate": lambda of: {labels: value / of[0] for labels, value in _increase(of).items()},
    "summed": _summed,
}
