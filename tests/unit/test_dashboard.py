"""Every series of the Grafana dashboard is one that step_ray or Ray exports, with those tags."""

import ast
import json
import re
from pathlib import Path

import pytest
import ray

import step_ray

PACKAGE = Path(step_ray.__file__).parent
BOARD = json.loads((PACKAGE.parent / "cluster" / "grafana" / "step_ray.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SERIES = re.compile(r"\bray_[a-z0-9_]+(?={)")
SCRAPED = {"ray_io_cluster", "instance", "le"}
"""Labels that Prometheus adds, or a histogram has."""


def own_series():
    """Exported name -> tags, read from the calls that make our metrics."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(call, "func", None), "id", "")
            if not isinstance(call, ast.Call) or name not in ("Counter", "Gauge", "Histogram"):
                continue
            if not call.args or not isinstance(call.args[0], ast.Constant):
                continue
            suffix = "_total" if name == "Counter" else ""
            tags = ast.literal_eval(call.args[2]) if len(call.args) > 2 else ()
            found[f"ray_{call.args[0].value}{suffix}"] = set(tags)
    return found


def rays_panels():
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return "".join(path.read_text() for path in folder.glob("*_panels.py"))


def used():
    return {name for expression in EXPRESSIONS for name in SERIES.findall(expression)}


def test_our_series_are_all_shown_and_exist():
    ours = {name for name in used() if name.startswith("ray_step_ray_")}
    assert ours == set(own_series())


def test_rays_series_are_those_of_its_own_dashboards():
    text = rays_panels()
    rays = {name for name in used() if not name.startswith("ray_step_ray_")}
    assert len(rays) > 10
    assert [name for name in sorted(rays) if name not in text] == []


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_balanced_filtered_and_grouped_by_tags_that_exist(expression):
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}") == len(SERIES.findall(expression))
    assert expression.count('{ray_io_cluster=~"$cluster"') == expression.count("{")
    tags = {
        tag.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for tag in by.split(",")
    }
    (name, *_) = SERIES.findall(expression)
    if name.startswith("ray_step_ray_"):
        assert tags <= own_series()[name]
    else:
        text = rays_panels()
        assert all(tag in text for tag in tags - SCRAPED)


def test_panels_have_places_of_their_own_and_a_data_source_that_is_asked_for():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    spots = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in BOARD["panels"]]
    assert len(spots) == len(set(spots))
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in BOARD["panels"])
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
    assert {v["name"] for v in BOARD["templating"]["list"]} == {"datasource", "cluster"}
