"""The one table of versions."""

from __future__ import annotations

import pytest

from engine_adapter.cluster.connectors import FACTS
from engine_adapter.cluster.versions import (
    CONNECTORS,
    KNOWN,
    NAMES,
    Span,
    belongs,
    connector,
    connector_names,
    misplaced,
    version_of,
)


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.9.1", (0, 9, 1)), ("0.11.0rc1", (0, 11, 0)), ("0.32", (0, 32, 0)), ("0.10.1.post1", (0, 10, 1))],
)
def test_a_release_candidate_counts_as_its_release(text: str, version: tuple[int, int, int]) -> None:
    assert version_of(text) == version


def test_a_name_is_in_one_row_a_version() -> None:
    for engine, (since, until) in KNOWN.items():
        for name in {entry.name for entry in CONNECTORS}:
            rows = [entry.span for entry in CONNECTORS if (entry.engine, entry.name) == (engine, name)]
            for minor in range(since[1], min(until[1], 40) + 1):
                assert sum((0, minor, 1) in span for span in rows) <= 1, (engine, name, minor)


def test_every_connector_that_hands_over_has_its_facts() -> None:
    assert {(entry.engine, entry.name) for entry in CONNECTORS if not entry.store} == set(FACTS)


def test_every_connector_is_in_some_version_there_can_be() -> None:
    for entry in CONNECTORS:
        since, until = KNOWN[entry.engine]
        assert entry.span.since < until and entry.span.until > since


@pytest.mark.parametrize(
    ("version", "known"), [("0.9.1", True), ("0.11.0", True), ("0.23.0", True), ("0.32.0", False), ("0.31.0", True)]
)
def test_vllm_0_32_takes_no_kv_parallel_size(version: str, known: bool) -> None:
    for name in ("kv_parallel_size", "kv_rank", "kv_buffer_size", "kv_ip"):
        assert belongs("kv-transfer-config", name, "vllm", version_of(version)) is known


def test_connectors_come_and_go() -> None:
    assert connector_names("vllm-ascend", (0, 9, 1)) == ["LLMDataDistCMgrConnector"]
    assert connector_names("vllm-ascend", (0, 9, 2)) == []
    assert "LLMDataDistCMgrConnector" in connector_names("vllm-ascend", (0, 11, 0))
    assert "LLMDataDistCMgrConnector" not in connector_names("vllm-ascend", (0, 12, 0))
    assert "MooncakeLayerwiseConnector" not in connector_names("vllm-ascend", (0, 10, 2))
    assert "UCMConnector" not in connector_names("vllm-ascend", (0, 13, 0))
    assert connector("vllm", "MooncakeConnector", (0, 13, 0)) is None


def test_a_name_with_two_spans_is_known_in_both() -> None:
    assert misplaced("environment", "VLLM_NIXL_ABORT_REQUEST_TIMEOUT", "vllm", (0, 18, 0)) is None
    assert misplaced("environment", "VLLM_NIXL_ABORT_REQUEST_TIMEOUT", "vllm-ascend", (0, 18, 0)) is not None


def test_a_name_that_is_not_in_the_table_is_anybodys() -> None:
    assert belongs("environment", "MY_OWN", "vllm", (0, 32, 0))


def test_a_span_says_itself() -> None:
    assert str(Span(until=(0, 12, 0))) == "versions before 0.12.0"
    assert str(Span((0, 10, 0), (0, 12, 0))) == "versions from 0.10.0 and before 0.12.0"
    assert str(Span()) == "every version"
    assert all(str(entry.span) and entry.instead for entry in NAMES)
