"""The files of `configs/prometheus`: they are what Prometheus and Grafana take, and name only metrics and labels that a
running proxy and a running sidecar have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.metrics_page import proxy_families, sidecar_families
from tests.proxy_blackbox.harness import PROXY, Engines, Proxy
from tests.sidecar_processes.harness import Sidecar

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "prometheus"
ALERTS = "alerts.yml"
FAMILIES = {**sidecar_families(), **proxy_families()}
OF_TARGETS = {"job", "instance", "le"}
NEEDS_PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
_NAME = re.compile(r"\b((?:pd_proxy|baton_sidecar|process)_\w+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")


def rules() -> list[dict[str, Any]]:
    told = yaml.safe_load((CONFIGS / ALERTS).read_text())
    assert set(told) == {"groups"}
    return [rule for group in told["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / "grafana.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [one for one in dashboard()["panels"] if one["type"] != "row"]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [one["expr"] for panel in panels() for one in panel["targets"]]


def family_of(name: str) -> str:
    bare = re.sub(r"_(bucket|sum|count)$", "", name)
    return bare if bare in FAMILIES and FAMILIES[bare].kind == "histogram" else name


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The kind of every family that a running proxy and a running sidecar expose, under its whole name."""
    engines = Engines(1, 1)
    proxy = Proxy(engines)
    try:
        with Sidecar(tmp_path_factory.mktemp("sidecar"), "s", "shm") as sidecar:
            pages = [proxy.get("/metrics").body.decode(), sidecar.get("/metrics")[1]]
    finally:
        proxy.stop()
        engines.process.stop()
    yield {
        one.name + ("_total" if one.type == "counter" else ""): one.type
        for page in pages
        for one in text_string_to_metric_families(page)
        if not one.name.endswith("_created")
    }


def test_what_runs_exposes_what_is_declared(shown: dict[str, str]) -> None:
    assert shown == {name: one.kind for name, one in FAMILIES.items()}


def test_every_metric_that_is_named_is_there_with_its_labels(shown: dict[str, str]) -> None:
    for expression in expressions():
        named = [(family_of(name), matchers) for name, matchers in _NAME.findall(expression)]
        known = set(OF_TARGETS)
        for name, matchers in named:
            assert name in shown, f"{name} in {expression}"
            labels = set(FAMILIES[name].labels) | OF_TARGETS
            assert set(re.findall(r'(\w+)\s*[=!]~?\s*"', matchers)) <= labels, expression
            known |= labels
        grouped = {label.strip() for group in _BY.findall(expression) for label in group.split(",")}
        assert grouped <= known, expression


def test_the_rules_say_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 8
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"\d+[sm]", rule["for"])
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "runbook"} and len(rule["annotations"]["runbook"]) > 80
        told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        named = {label for name, _ in _NAME.findall(rule["expr"]) for label in FAMILIES[family_of(name)].labels}
        assert told <= named | OF_TARGETS, rule["alert"]


def test_the_flags_and_files_that_a_runbook_names_exist() -> None:
    text = " ".join(rule["annotations"]["runbook"] for rule in rules())
    known = subprocess.run([PROXY, "--help"], capture_output=True, text=True, check=True)
    flags = set(re.findall(r"--[a-z][a-z-]+", text))
    assert flags and not {flag for flag in flags if flag not in known.stdout}
    assert all((ROOT / path).exists() for path in re.findall(r"docs/\w+\.md", text))


def test_the_scrape_file_names_the_jobs_of_the_rules() -> None:
    told = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    assert told["rule_files"] == [ALERTS]
    jobs = {one["job_name"] for one in told["scrape_configs"]}
    used = set(re.findall(r'job="([\w-]+)"', (CONFIGS / ALERTS).read_text()))
    assert jobs == used == {"baton-proxy", "baton-sidecar"}


def test_grafana_can_import_the_dashboard() -> None:
    told = dashboard()
    assert told["schemaVersion"] >= 36 and told["title"] and told["uid"] and told["id"] is None
    variables = {one["name"]: one for one in told["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert [one["title"] for one in told["panels"] if one["type"] == "row"] == [
        "Traffic", "Latency", "Instances", "KV", "Process",
    ]  # fmt: skip
    ids = [one["id"] for one in told["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["targets"] and panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert len({one["refId"] for one in panel["targets"]}) == len(panel["targets"])
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        for one in panel["targets"]:
            assert one["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"\$(\w+)", one["expr"])) <= {*variables, "__rate_interval"}


@NEEDS_PROMTOOL
def test_promtool_takes_the_files() -> None:
    promtool("check", "rules", str(CONFIGS / ALERTS))
    promtool("check", "config", str(CONFIGS / "prometheus.yml"))


@NEEDS_PROMTOOL
def test_promtool_takes_what_the_panels_ask(tmp_path: Path) -> None:
    asked = [one["expr"] for panel in panels() for one in panel["targets"]]
    written = [expr.replace("$__rate_interval", "5m").replace("$job", ".+") for expr in asked]
    records = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(written)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": records}]}))
    promtool("check", "rules", "--lint=none", str(path))


@NEEDS_PROMTOOL
def test_the_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))


def promtool(*words: str) -> None:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
