from __future__ import annotations

import re
from pathlib import Path

from tests.metrics_page import PAGE, proxy_families, rendered, sidecar_families

README = Path(__file__).parents[1] / "README.md"
_NAME = re.compile(r"\b((?:pd_proxy|baton_sidecar)_[a-z_0-9]+)(?:\{([^}]*)\})?")


def test_the_page_is_what_is_declared() -> None:
    assert PAGE.read_text() == rendered(), "python -m tests.metrics_page > docs/metrics.md"


def test_the_readme_names_what_there_is() -> None:
    families = {**proxy_families(), **sidecar_families()}
    for name, labels in _NAME.findall(README.read_text()):
        assert name in families, name
        assert {label.strip() for label in labels.split(",") if label} <= set(families[name].labels), name


def test_names_follow_prometheus() -> None:
    for name, (kind, labels) in {**proxy_families(), **sidecar_families()}.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name)
        assert name.endswith("_total") is (kind == "counter"), name
        assert not re.search(r"_(ms|millis\w*|minutes|kb|mb|percent)(_|$)", name), name
        assert kind != "histogram" or name.endswith("_seconds"), name
        assert not {"instance", "job", "le", "request_id", "id"} & set(labels), name
