"""The dashboard asks for series that the farm, the service and Ray export, by labels that they have."""

import asyncio
import json
from collections.abc import Iterator

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from pipeline.monitoring import metrics
from pipeline.serving.http.scrape import scraped
from pipeline.serving.queue.store import Census
from tests.deploy.manifests import DEPLOY

DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
OF_RAY = {f"ray_{name}": {"GpuIndex", "instance"} for name in METRICS_GAUGES}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of every series by its name, as the code that exports them says."""
    series: dict[str, set[str]] = {}

    def records(*suffixes: str, labels: tuple[str, ...] = ()) -> type:
        class Recorder:
            def __init__(self, name: str, _description: str, *arguments: object) -> None:
                tags = next((one for one in arguments if isinstance(one, tuple)), ())
                series.update({f"ray_{name}{suffix}": {*tags, *labels} for suffix in suffixes})

            def set(self, _value: float) -> None:
                """Keep nothing."""

        return Recorder

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metrics.metrics, "Gauge", records(""))
        patched.setattr(metrics.metrics, "Counter", records("_total"))
        patched.setattr(metrics.metrics, "Histogram", records("_bucket", "_sum", "_count", labels=("le",)))
        metrics.StageMetrics()
        metrics.QueueMetrics(1)
        metrics.ServiceMetrics()
    text = asyncio.run(scraped(Census({}, 0.0), [])).decode()
    for family in text_string_to_metric_families(text):
        series |= {sample.name: set(sample.labels) for sample in family.samples}
    return series


def selected(query: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the names of a query's series, each with the labels by which it is selected or grouped."""
    names: list[tuple[str, set[str]]] = []
    grouped: set[str] = set()

    def visit(part: promql_parser.Expr) -> None:
        if isinstance(part, promql_parser.VectorSelector):
            names.append((part.name, {matcher.name for matcher in part.matchers.matchers}))
        if isinstance(part, promql_parser.AggregateExpr) and part.modifier:
            grouped.update(part.modifier.labels)

    promql_parser.walk(promql_parser.parse(query.replace("$__rate_interval", "5m")), visit)
    for name, labels in names:
        yield name, labels | grouped


def unknown(query: str, series: dict[str, set[str]]) -> list[str]:
    """Return what a query asks for and nobody exports."""
    found = []
    for name, labels in selected(query):
        if name not in series:
            found.append(name)
        found += sorted(labels - series.get(name, labels))
    return found


def test_every_series_and_label_is_exported(exported):
    assert [what for query in QUERIES for what in unknown(query, exported | OF_RAY)] == []


def test_everything_that_is_exported_can_be_seen(exported):
    """Sums of Ray's histograms are approximations, so the dashboard divides counters instead."""
    shown = {name for query in QUERIES for name, _ in selected(query)}
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in exported}
    assert families == {
        name.removesuffix("_bucket").removesuffix("_count") for name in shown if name.startswith(("ray_pyr", "pyr"))
    }
    assert not any(name.endswith("_sum") for name in shown)


def test_every_panel_has_title_description_unit_and_the_datasource_that_is_chosen():
    [variable] = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen] * (
            1 + len(panel["targets"])
        )
        assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_have_their_own_ids_and_places():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24
