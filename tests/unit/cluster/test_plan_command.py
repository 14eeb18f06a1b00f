"""`pd-cluster plan`, for a cluster on one machine and for a deployment over several nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_adapter.cluster import cli
from tests.unit.cluster.deployments import DIRECTORY, SMALL

Run = Callable[..., tuple[int, str, str]]
LOCAL = DIRECTORY.parent / "examples" / "1p1d-cpu.toml"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pd-cluster", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "small.toml").write_text(SMALL)
    return str(tmp_path / "small.toml")


def test_all_nodes_or_one(run: Run, small: str) -> None:
    rc, out, err = run("plan", small)
    assert (rc, err) == (0, "")
    assert "start_10_0_0_1()" in out and "start_10_0_0_2()" in out
    _, out, _ = run("plan", small, "--node", "10.0.0.2")
    assert "start_10_0_0_1()" not in out and "start_10_0_0_2()" in out


def test_json_is_for_programs(run: Run, small: str) -> None:
    said = json.loads(run("plan", small, "--format", "json")[1])
    assert [it["name"] for it in said["processes"]] == ["prefill-0", "decode-0", "proxy"]
    said = json.loads(run("plan", small, "--format", "json", "--node", "10.0.0.2")[1])
    assert [it["name"] for it in said["processes"]] == ["decode-0"]


def test_a_cluster_on_one_machine_is_printed_as_before(run: Run) -> None:
    rc, out, err = run("plan", str(LOCAL))
    assert (rc, err) == (0, "")
    assert out.startswith("# prefill-0.sidecar\n")
    said = json.loads(run("plan", str(LOCAL), "--format", "json")[1])
    assert [it["kind"] for it in said["processes"]] == ["sidecar", "sidecar", "engine", "engine", "proxy"]


def test_a_node_that_is_not_there(run: Run, small: str) -> None:
    rc, out, err = run("plan", small, "--node", "10.0.0.3")
    assert (rc, out) == (2, "")
    assert err.startswith(f'pd-cluster: --node 10.0.0.3: {small} has no such node; did you mean "10.0.0.')


def test_one_machine_has_no_nodes(run: Run) -> None:
    rc, _, err = run("plan", str(LOCAL), "--node", "10.0.0.3")
    assert rc == 2
    assert "has no [[node]], all of it runs on one machine" in err


def test_flags_of_one_machine_are_refused_for_many(run: Run, small: str) -> None:
    for words in (["--model", "/x"], ["--port", "1"]):
        rc, out, err = run("plan", small, *words)
        assert (rc, out) == (2, "")
        assert err == f"pd-cluster: {words[0]}: for a deployment over several nodes, say it in {small}\n"


def test_mistakes_are_listed(run: Run, small: str) -> None:
    Path(small).write_text(SMALL.replace("tp = 2", "tp = 2\nnonsense = 1"))
    rc, out, err = run("plan", small)
    assert (rc, out) == (2, "")
    assert [line.split("; ")[0] for line in err.splitlines()] == [
        f'pd-cluster: {small}: unknown key "{role}.nonsense"' for role in ("prefill", "decode")
    ]


def test_up_says_what_it_takes(run: Run, small: str) -> None:
    rc, _, err = run("up", small)
    assert rc == 2
    there = "(10.0.0.1, 10.0.0.2)"
    said = f"{small} has several nodes: say which this is by --node {there}, or add --rehearse"
    assert err == f"pd-cluster: {said}\n"
    assert "did you mean" in run("up", small, "--node", "10.0.0.3")[2]
    assert run("up", small, "--node", "10.0.0.1", "--once")[2] == "pd-cluster: --once: of a rehearsal; add --rehearse\n"
    assert "a rehearsal is of all nodes" in run("up", small, "--rehearse", "--node", "10.0.0.1")[2]
    assert "has no [[node]]" in run("up", str(LOCAL), "--rehearse")[2]
    assert "over several nodes" in run("demo", small)[2]


def test_nothing_is_up(run: Run, small: str) -> None:
    for command in ("status", "down"):
        for which in (small, "small"):
            rc, out, err = run(command, which)
            assert (rc, out) == (1, "")
            assert err.startswith("pd-cluster: small is not up (.baton/run); is it another --dir")
