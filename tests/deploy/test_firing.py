"""Each alert fires at what it is for and stays silent at what it is not for, by an evaluator of ours (promql.py)."""

import re
from collections.abc import Callable, Iterator

import pytest

from tests.deploy.promql import Figures, Labels, Vector, evaluate, seconds
from tests.deploy.written import monitor, rules

RULES = rules()
EVERY_S = seconds(monitor()["global"]["scrape_interval"])
MINUTE, HOUR, DAY = 60, 3600, 86400
UNTIL_S = 2 * HOUR
NODE = (("instance", "cloud:7071"), ("job", "isthmus"))
WAITED, BUDGET = "isthmus_request_queue_seconds_bucket", "isthmus_activation_budget_bytes"
STARTS, STAGES = "isthmus_start_time_seconds", "isthmus_stage_restarts_total"
MISSING, EXPIRY = "isthmus_stages_missing", "isthmus_certificate_expiry_timestamp_seconds"

Told = Callable[[int], float | None]
"""A figure by the seconds since the beginning; None while the node does not answer."""


def series(name: str, told: Told, *, until_s: int = UNTIL_S, **labels: str) -> Figures:
    """What Prometheus has of a figure that it asked for all the time."""
    carried = frozenset({**dict(NODE), **{label.rstrip("_"): value for label, value in labels.items()}}.items())
    return {(name, carried): [(at, told(at)) for at in range(0, until_s + 1, EVERY_S)]}


def always(value: float) -> Told:
    return lambda at: value


def growing(per_minute: float) -> Told:
    return lambda at: at * per_minute / MINUTE


def fires(alert: str, figures: Figures) -> Iterator[tuple[int, Vector]]:
    """When an alert fires, and of what: all that its query has given for as long as it asks for."""
    since: dict[Labels, int] = {}
    for at in range(0, UNTIL_S + 1, EVERY_S):
        found = evaluate(RULES[alert]["expr"], figures, at)
        since = {labels: since.get(labels, at) for labels in found}
        held = {labels: value for labels, value in found.items() if at - since[labels] >= seconds(RULES[alert]["for"])}
        if held:
            yield at, held


def errors(per_minute: float, of_requests: float, kind: str = "wire") -> Figures:
    asked = {"pass_": "forward", "outcome": "answered"}
    counted = series("isthmus_errors_total", growing(per_minute), kind=kind)
    return {**counted, **series("isthmus_requests_total", growing(of_requests), **asked)}


def forwards(again: float, budget: float) -> Figures:
    """Forward passes of a teraFLOP a minute, and those run again."""
    found = series("isthmus_flops_total", growing(1e12), pass_="forward")
    found = {**found, **series("isthmus_flops_total", growing(again), pass_="recompute")}
    return {**found, **series(BUDGET, always(budget))}


def waits(longer_than_5_s: int) -> Figures:
    """Of 100 requests a minute so many wait between 5 and 10 seconds, and the others no second."""
    found: Figures = {}
    for bound, count in (("1.0", 100 - longer_than_5_s), ("5.0", 100 - longer_than_5_s), ("10.0", 100), ("+Inf", 100)):
        found = {**found, **series(WAITED, growing(count), le=bound, pass_="forward")}
    return found


def dying_while_it_loads() -> Figures:
    """A node that opens its status port, loads for 3 minutes, dies, and is begun again a minute later."""

    def dead(at: int) -> bool:
        return at % (4 * MINUTE) >= 3 * MINUTE

    return {
        **series("up", lambda at: 0.0 if dead(at) else 1.0),
        **series("isthmus_ready", lambda at: None if dead(at) else 0.0),
        **series(STARTS, lambda at: None if dead(at) else 1e9 + at // (4 * MINUTE) * 4 * MINUTE),
    }


AT_THESE = [
    ("IsthmusNodeDown", series("up", always(0))),
    ("IsthmusNodeNotReady", series("isthmus_ready", always(0))),
    ("IsthmusNodeRestarting", dying_while_it_loads()),
    ("IsthmusManyErrors", errors(1, of_requests=10)),
    ("IsthmusManyErrors", errors(1, of_requests=0)),
    ("IsthmusRequestsWaitLong", waits(longer_than_5_s=10)),
    ("IsthmusForwardsAgain", forwards(again=0.3e12, budget=1 << 32)),
    ("IsthmusStagesRestarting", series(STAGES, growing(1 / 5))),
    ("IsthmusStagesMissing", series(MISSING, always(1))),
    ("IsthmusCertificateExpires", series(EXPIRY, always(UNTIL_S + 3 * DAY))),
    ("IsthmusCertificateExpires", series(EXPIRY, always(-3 * DAY))),
]

NOT_AT_THESE = [
    ("IsthmusNodeDown", {**series("up", always(1)), **series("up", always(0), job="other")}),
    ("IsthmusNodeDown", series("up", lambda at: 0.0 if HOUR <= at < HOUR + MINUTE else 1.0)),
    ("IsthmusNodeNotReady", series("isthmus_ready", lambda at: float(at >= 9 * MINUTE))),
    ("IsthmusNodeRestarting", series(STARTS, lambda at: 1e9 + HOUR * (at >= HOUR))),
    ("IsthmusManyErrors", errors(1, of_requests=30)),
    ("IsthmusManyErrors", errors(0.5, of_requests=1)),
    ("IsthmusManyErrors", errors(60, of_requests=0, kind="draining")),
    ("IsthmusRequestsWaitLong", waits(longer_than_5_s=4)),
    ("IsthmusForwardsAgain", forwards(again=0.1e12, budget=1 << 32)),
    ("IsthmusForwardsAgain", forwards(again=1e12, budget=0)),
    ("IsthmusStagesRestarting", series(STAGES, growing(1 / 20))),
    ("IsthmusStagesMissing", series(MISSING, lambda at: float(HOUR <= at < HOUR + 2 * MINUTE))),
    ("IsthmusCertificateExpires", series(EXPIRY, always(UNTIL_S + 8 * DAY))),
]


@pytest.mark.parametrize(("alert", "figures"), AT_THESE, ids=[alert for alert, _ in AT_THESE])
def test_an_alert_fires_and_goes_on_as_long_as_there_is_cause(alert: str, figures: Figures) -> None:
    times = dict(fires(alert, figures))
    assert list(times) == list(range(min(times), UNTIL_S + 1, EVERY_S))
    assert min(times) <= 30 * MINUTE
    assert {dict(labels)["instance"] for found in times.values() for labels in found} == {"cloud:7071"}


@pytest.mark.parametrize(("alert", "figures"), NOT_AT_THESE, ids=[alert for alert, _ in NOT_AT_THESE])
def test_an_alert_is_silent_at_what_it_is_not_for(alert: str, figures: Figures) -> None:
    assert not list(fires(alert, figures))


def test_every_rule_is_tried_both_ways() -> None:
    assert {alert for alert, _ in AT_THESE} == {alert for alert, _ in NOT_AT_THESE} == set(RULES)


def test_a_node_that_dies_again_and_again_while_it_loads_is_seen_by_its_restarts_alone() -> None:
    figures = dying_while_it_loads()
    assert not list(fires("IsthmusNodeDown", figures))
    assert not list(fires("IsthmusNodeNotReady", figures))
    (_, first), *_ = fires("IsthmusNodeRestarting", figures)
    assert first == {frozenset(NODE): 2}


def test_what_is_said_of_a_certificate_reads_well_past_the_date() -> None:
    summary = RULES["IsthmusCertificateExpires"]["annotations"]["summary"]
    past = re.sub(r"{{ if gt \$value 0.0 }}.*{{ else }}(.*){{ end }}", r"\1", summary)
    assert past.endswith("the server's certificate has expired")


def test_the_evaluator_counts_on_when_a_counter_begins_again_at_0_and_forgets_who_does_not_answer() -> None:
    counter = series("c_total", lambda at: (30.0, 40.0, 5.0, None, 7.0)[at // EVERY_S], until_s=4 * EVERY_S)
    assert evaluate("increase(c_total[5m])", counter, 2 * EVERY_S) == {frozenset(NODE): 15}
    assert evaluate("increase(c_total[5m])", counter, 4 * EVERY_S) == {frozenset(NODE): 17}
    assert evaluate("changes(c_total[5m])", counter, 4 * EVERY_S) == {frozenset(NODE): 3}
    assert evaluate("c_total > 1", counter, 3 * EVERY_S) == {}
    assert evaluate('c_total{job!~"is.*|x"}', counter, 0) == {}


def test_the_evaluator_finds_a_quantile_within_its_bucket_and_refuses_what_it_does_not_know() -> None:
    buckets = waits(longer_than_5_s=10)
    (found,) = evaluate("histogram_quantile(0.95, sum by (job, le) (rate(" + WAITED + "[5m])))", buckets, HOUR).values()
    assert found == pytest.approx(7.5)
    for query in ("avg(up)", "up or up", "up + 1", 'up{job=~"a"}', "increase(up[5m] offset 1h)", "1 < up < 2"):
        with pytest.raises((ValueError, SyntaxError)):
            evaluate(query, series("up", always(1)), HOUR)
