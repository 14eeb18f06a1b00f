from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from engine_adapter.cluster import machine
from engine_adapter.cluster.config import load, parse
from engine_adapter.cluster.errors import ClusterError
from engine_adapter.cluster.plan import SOCKET_PATH_LIMIT
from engine_adapter.cluster.up import deployment
from tests.unit.cluster.conftest import Bench


def found(bench: Bench, extra: str = "") -> list[str]:
    bench.write(extra)
    here = deployment(load(bench.file), bench.directory / ".baton")
    return machine.problems(here.config, here.plan, here.model_dir, machine.environment())


def test_a_plan_that_could_start_has_no_problem(bench: Bench) -> None:
    assert found(bench) == []


def test_an_occupied_port_is_named_with_whose_it_was_to_be(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (line,) = found(bench, f"[sidecar]\nport = {port}")[:1]
        assert line == (
            f"port {port} on 127.0.0.1 for prefill-0.sidecar is occupied; stop what listens there or give another, "
            "or 0 to have one chosen"
        )


def test_a_host_that_is_not_this_machine_is_said(bench: Bench) -> None:
    bench.file.write_text(bench.file.read_text().replace('name = "c"', 'name = "c"\nhost = "192.0.2.1"'))
    with pytest.raises(ClusterError, match=r"free ports are needed on 192\.0\.2\.1.*address of this machine"):
        deployment(load(bench.file), bench.directory / ".baton")


def test_a_missing_model_is_said_with_how_to_get_one(bench: Bench) -> None:
    (bench.directory / "m" / "config.json").unlink()
    assert found(bench)[0].startswith("model directory m has no config.json; give a Hugging Face model directory")
    (bench.directory / "m").rmdir()
    assert found(bench)[0].startswith("model directory m does not exist; ")


def test_a_model_that_is_made_need_not_be_there(bench: Bench) -> None:
    bench.file.write_text(bench.file.read_text().replace('path = "m"', "make = {}"))
    here = deployment(load(bench.file), bench.directory / ".baton")
    assert machine.problems(here.config, here.plan, here.model_dir, machine.environment()) == []
    assert here.model_dir == bench.directory / ".baton/models/qwen3-small"


def test_a_missing_command_is_said(bench: Bench) -> None:
    bench.file.write_text(bench.file.read_text().replace(f'sidecar = ["{sys.executable}"', 'sidecar = ["no-such"'))
    here = deployment(load(bench.file), bench.directory / ".baton")
    assert machine.problems(here.config, here.plan, here.model_dir, machine.environment()) == [
        "no-such: no such command on PATH; run `make install`"
    ]


def test_pools_over_the_memory_are_refused_just_past_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: 2 * 1024**3)
    assert found(bench, '[engine]\nkv_pool = "1GiB"') == []
    (line,) = found(bench, f"[engine]\nkv_pool = {1024**3 + 1}")
    assert line.startswith("the KV pools need 2.0 GiB of shared memory together and 2.0 GiB are free; lower")


def test_a_block_is_measured_by_the_models_own_config(tmp_path: Path) -> None:
    config = parse('[model]\npath="m"\n[[instance]]\nrole="prefill"\n[[instance]]\nrole="decode"\n', "f")
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "dtype": "float32"}))
    assert machine.block_bytes(tmp_path, config) == 3 * 2 * 16 * 2 * 8 * 4
    (tmp_path / "config.json").write_text(json.dumps({**shape, "head_dim": 16}))
    assert machine.block_bytes(tmp_path, config) == 3 * 2 * 16 * 2 * 16 * 2
    (tmp_path / "config.json").write_text("[]")
    assert machine.block_bytes(tmp_path, config) == 0


def test_chosen_ports_are_free_different_and_not_the_files(bench: Bench) -> None:
    bench.write("[sidecar]\nport = 18000")
    config = load(bench.file)
    ports = machine.choose_ports("127.0.0.1", 200, config)
    assert len(set(ports)) == 200
    assert not {18000, 18001} & set(ports)
    assert all(port in machine.CHOSEN_PORTS for port in ports)


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= machine.num_cores() <= (os.cpu_count() or 1)
    available = machine.memory_available_bytes()
    assert available is not None
    assert available > 0


def test_sockets_are_private_short_and_at_the_same_place_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    directory = machine.socket_directory(deep)
    assert directory == machine.socket_directory(deep) != machine.socket_directory(tmp_path)
    assert directory.parent == Path("/tmp")
    assert machine.fits(str(directory))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    assert machine.socket_directory(deep) == directory, "too deep for a socket"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/shm")
    assert machine.socket_directory(deep).parent == Path("/dev/shm")


def test_the_longest_directory_that_fits_really_takes_a_socket(tmp_path: Path) -> None:
    room = SOCKET_PATH_LIMIT - machine.LONGEST_SOCKET_NAME - len(str(tmp_path)) - 1
    longest = tmp_path / ("d" * room)
    longest.mkdir()
    assert machine.fits(str(longest))
    assert not machine.fits(str(longest) + "d")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(longest) + "x" * machine.LONGEST_SOCKET_NAME)


def test_a_private_directory_is_emptied_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "s"
    machine.make_private(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (directory / "left.sock").touch()
    machine.make_private(directory)
    assert list(directory.iterdir()) == []
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(ClusterError, match="belongs to somebody else"):
        machine.make_private(tmp_path / "link")
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(ClusterError, match="belongs to somebody else"):
        machine.make_private(directory)


def test_a_run_directory_is_held_by_one(tmp_path: Path) -> None:
    with (
        machine.locked(tmp_path / "run"),
        pytest.raises(ClusterError, match=rf"already up \(pid {os.getpid()}"),
        machine.locked(tmp_path / "run"),
    ):
        pass
    with machine.locked(tmp_path / "run"):
        pass
