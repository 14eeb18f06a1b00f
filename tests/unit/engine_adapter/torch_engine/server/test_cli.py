from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine_adapter.torch_engine.cli import main

PORT_0 = ["--port", "0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serv"], "unknown command 'serv'; did you mean serve?"),
        (["serve", "--modle", "x", "--model", "x"], "unknown flag --modle; did you mean --model?"),
        (["serve", "--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["serve", "--model", "x", "--kv-lease=3"], "unknown flag --kv-lease; did you mean --kv-lease-s?"),
        (["serve", "--model", "x", "--role", "prefil"], "none of prefill, decode, both; did you mean prefill?"),
        (["serve", "--model", "x", "--port", "x"], "--port 'x'"),
        (["serve", "--model", "x", "--port", "70000"], "--port '70000'"),
        (["serve", "--model", "x", "--block-size", "0"], "--block-size '0'"),
        (["serve", "--model", "x", "--kv-pool-bytes", "2 lots"], "--kv-pool-bytes '2 lots' is no size"),
        (["serve", "--model", "x", "extra"], "unexpected argument 'extra'"),
        (["serve"], "--model"),
        (["make-model", "x", "--family", "qwen9"], "none of qwen3, qwen2, llama, qwen3_moe, qwen2_5_vl; did you mean"),
        (["serve", "--model", "x", "--limit-mm-per-prompt", "video=1"], "write image=N, or"),
        (["serve", "--model", "x", "--media-fetch-timeout-s", "0"], "--media-fetch-timeout-s '0'"),
        (["serve", "--model", "x", "--device", "gpu"], "did you mean cuda?"),
        ([], "{serve,make-model}"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys\nfrom engine_adapter.torch_engine.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    for words in (["serve", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout
    assert done.stdout.startswith("pd-baton ")


@pytest.fixture
def bad_directories(tmp_path: Path) -> dict[str, Path]:
    directories = {name: tmp_path / name for name in ("empty", "broken", "unknown")}
    for directory in directories.values():
        directory.mkdir()
    (directories["broken"] / "config.json").write_text("{")
    (directories["unknown"] / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    return directories | {"absent": tmp_path / "absent"}


@pytest.mark.parametrize(
    ("which", "said"),
    [("absent", "no model directory"), ("empty", "config.json"), ("broken", "config.json"), ("unknown", "bert")],
)
def test_a_bad_model_directory_is_one_line_and_1(
    which: str, said: str, bad_directories: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(bad_directories[which]), *PORT_0]) == 1
    line = capsys.readouterr().err
    assert said in line.lower() or said in line
    assert line.count("\n") == 1


def test_an_occupied_port_is_said_before_the_model_is_loaded(
    bad_directories: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(bad_directories["unknown"]), "--port", port]) == 1
    line = capsys.readouterr().err
    assert f"port {port} on 127.0.0.1 is in use" in line
    assert line.count("\n") == 1


def test_too_small_a_pool_is_said(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", str(model_dir), *PORT_0, "--kv-pool-bytes", "100TiB".replace("T", "000G")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_make_model_does_not_write_over_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["make-model", str(tmp_path)]) == 1
    assert "not an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
