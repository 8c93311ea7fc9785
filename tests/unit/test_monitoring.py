"""Dashboard, alerts and the page that says what to do about them, held together."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests import promql

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_every_alert_has_a_section_and_every_section_an_alert() -> None:
    part = OPERATIONS.read_text().split("\n## When an alert fires\n")[1].split("\n## ")[0]
    sections = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=^### |\Z)", part, re.MULTILINE | re.DOTALL))
    names = [rule["alert"] for rule in promql.alerts()]
    assert Counter(names) == Counter(sections.keys())
    for name, text in sections.items():
        assert len(text.split()) > 20, f"{name}: that helps nobody"


def test_alerts_say_how_bad_it_is_and_name_what_they_found() -> None:
    for rule in promql.alerts():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        kept = set().union(*(selector.labels for selector in promql.selectors(rule["expr"]))) | promql.SCRAPED
        assert told <= kept | {"executor"}, rule["alert"]


def test_the_example_of_prometheus_reads_the_alerts_and_names_the_jobs_that_they_go_by() -> None:
    config = yaml.safe_load((promql.DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert config["rule_files"] == [promql.ALERTS.name]
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {"enginehouse-gateway", "enginehouse-executor", "enginehouse-builder"}
    compose = yaml.safe_load((promql.DEPLOY.parent / "docker-compose.yml").read_text())
    published = {
        port.rpartition(":")[0] for service in compose["services"].values() for port in service.get("ports", ())
    }
    targets = {target for job in config["scrape_configs"] for at in job["static_configs"] for target in at["targets"]}
    assert targets <= published


def test_panels_lie_beside_each_other_and_say_what_they_show() -> None:
    places: set[tuple[int, int]] = set()
    for panel in promql.panels():
        grid = panel["gridPos"]
        area = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not area & places and max(x for x, _ in area) < 24, panel["title"]
        places |= area
        assert panel["description"] and panel["targets"], panel["title"]
    ids = [panel["id"] for panel in promql.panels()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("query", ["sum(x", 'x{a="b}', "rate(x)", "sum by (a (x)"])
def test_what_prometheus_would_not_take_is_found(query: str) -> None:
    with pytest.raises(ValueError, match="."):
        promql.selectors(query)
