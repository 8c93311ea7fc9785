"""What dashboard and alerts ask of Prometheus."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser as promql
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "enginehouse.json"
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


class Selector(NamedTuple):
    """A metric, the labels that it is selected by, and those that its value is then told by."""

    metric: str
    equal: dict[str, str]
    labels: set[str]


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def variables() -> list[Selector]:
    """`label_values(metric, label)`."""
    found = []
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            assert match, variable["definition"]
            found.append(Selector(match[1], {}, {match[2]}))
    return found


def queries() -> list[str]:
    """Of all panels, Grafana's variables filled in, and of all alerts."""
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [query.replace("$__rate_interval", "1m") for query in asked] + [rule["expr"] for rule in alerts()]


def selectors(query: str) -> list[Selector]:
    """Raises ValueError for what Prometheus would not take."""
    return list(_walk(promql.parse(query), set()))


def _walk(node: Any, labels: set[str]) -> Iterator[Selector]:
    modifier = getattr(node, "modifier", None)
    if isinstance(node, promql.AggregateExpr) and modifier:
        labels = labels | set(modifier.labels)
    elif isinstance(node, promql.BinaryExpr) and modifier and modifier.matching:
        labels = labels | set(modifier.matching.labels)
    if isinstance(node, promql.VectorSelector):
        matchers = node.matchers.matchers
        equal = {matcher.name: matcher.value for matcher in matchers if matcher.op == promql.MatchOp.Equal}
        yield Selector(node.name, equal, labels | {matcher.name for matcher in matchers})
    elif isinstance(node, promql.MatrixSelector):
        yield from _walk(node.vector_selector, labels)
    else:
        parts = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")]
        for part in [*parts, *getattr(node, "args", ())]:
            if part is not None:
                yield from _walk(part, labels)
