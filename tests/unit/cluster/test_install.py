from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from engine_adapter.cluster import install

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  Downloading torch-2.13.0-cp311-cp311-x_y.whl (104.3 MB)\n", "downloading torch-2.13.0 (104.3 MB)"),
        ("Downloading https://host/a/torch-2.13.0-cp311.whl (1.0 MB)\n", "downloading torch-2.13.0 (1.0 MB)"),
        ("  Downloading small-1.0-py3-none-any.whl (12 kB)\n", None),
        ("Installing collected packages: a, b, c\n", "installing 3 packages"),
        ("ERROR: No matching distribution found for x\n", "ERROR: No matching distribution found for x"),
        ("Collecting torch\n", None),
    ],
)
def test_what_takes_long_is_said(line: str, said: str | None) -> None:
    assert install.worth_saying(line) == said


def test_requirements_are_those_of_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert install.requirement("torch") in extras["engine"]
    assert [install.requirement("mooncake-transfer-engine")] == extras["mooncake"]


def test_a_library_is_looked_for_by_loading_it() -> None:
    assert install.loads("libc.so.6")
    assert not install.loads("libno-such.so.1")


def test_an_environment_that_works_is_kept_and_a_broken_one_is_not(tmp_path: Path) -> None:
    assert install.works(Path(sys.executable))
    assert not install.works(Path("/bin/false"))
    assert not install.works(tmp_path / "absent")


def test_without_apt_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "loads", lambda name: name != "libnuma.so.1")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    install.install_system_packages()
    said = capsys.readouterr().out
    assert "missing: gcc libc6-dev libnuma1; install them as root (apt-get install gcc libc6-dev libnuma1)" in said
    assert "KV moves through shared memory alone" in said
    assert "without a C compiler Python passes every token on" in said


FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$JOURNAL"
case "$(basename "$0") $*" in
  "apt-cache show --no-all-versions libcurl4t64") exit $HAS_T64 ;;
  "sudo -n true") exit $SUDO ;;
  "sudo -n "*) shift; exec "$@" ;;
  "apt-get "*" install "*) echo "E: no network"; exit $INSTALLS ;;
esac
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt and sudo that write down what they are asked."""
    for name in ("apt-get", "apt-cache", "sudo"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOURNAL": str(tmp_path / "journal")}
    for key, value in {**settings, "HAS_T64": "0", "SUDO": "0", "INSTALLS": "0", "CC": "sh"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(install, "loads", lambda _: False)
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    return tmp_path / "journal"


@pytest.mark.parametrize(("has_t64", "curl"), [("0", "libcurl4t64"), ("1", "libcurl4")])
def test_root_installs_what_is_missing_by_the_name_the_system_knows(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, has_t64: str, curl: str
) -> None:
    monkeypatch.setattr(install.os, "geteuid", lambda: 0)
    monkeypatch.setenv("HAS_T64", has_t64)
    install.install_system_packages()
    asked = fakes.read_text().splitlines()
    assert asked[0] == "apt-get -qq update"
    assert asked[-1] == f"apt-get -qq install -y --no-install-recommends libibverbs1 libnuma1 {curl}"


def test_a_compiler_is_installed_where_there_is_none(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.os, "geteuid", lambda: 0)
    monkeypatch.setattr(install, "loads", lambda _: True)
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    install.install_system_packages()
    assert fakes.read_text().splitlines()[-1].endswith("--no-install-recommends gcc libc6-dev")
    assert "without a C compiler" in capsys.readouterr().out, "apt has not brought it"
    monkeypatch.setenv("CC", "sh")
    fakes.unlink()
    install.install_system_packages()
    assert not fakes.exists()


def test_a_sudo_that_asks_nothing_is_used(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    install.install_system_packages()
    asked = fakes.read_text().splitlines()
    assert asked[0] == "sudo -n true"
    assert asked[-1].startswith("apt-get -qq install")


def test_a_sudo_that_asks_for_a_password_is_left_alone(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("SUDO", "1")
    install.install_system_packages()
    assert fakes.read_text() == "sudo -n true\n"
    assert "missing: libibverbs1 libnuma1 libcurl4; install them as root" in capsys.readouterr().out


def test_an_apt_that_fails_is_quoted_and_is_no_error(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.os, "geteuid", lambda: 0)
    monkeypatch.setenv("INSTALLS", "100")
    install.install_system_packages()
    assert fakes.exists()
    said = capsys.readouterr().out
    assert "apt-get failed: E: no network" in said
    assert "KV moves through shared memory alone" in said


def test_a_python_without_ensurepip_is_told_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert install.venv_package() == package
    assert not install.make_environment(tmp_path / "venv")
    assert f"apt-get install {package}" in capsys.readouterr().err


def test_an_old_python_is_told_so_by_the_script_and_by_make(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "OLDEST", (99, 0))
    monkeypatch.setattr(sys, "argv", ["install.py", "--stamp", str(tmp_path / "stamp")])
    assert install.main() == 1
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err
    assert not (tmp_path / "stamp").exists()
    made = subprocess.run(
        ["make", "--no-print-directory", "install", "PYTHON=", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 2
    assert "Python 3.11 or newer is needed" in made.stderr


def test_make_help_lists_every_target() -> None:
    result = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = [line.split()[1] for line in result.stdout.splitlines()]
    assert named == ["help", "install", "demo", "test", "test-vllm", "soak", "lint", "bench", "clean"]


def test_ci_runs_what_anybody_runs() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert [line for line in script.splitlines() if line.startswith("make ")] == [
        "make install",
        "make lint",
        'make test || again make test PYTEST_ARGS="--last-failed -n 0"',
    ]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    steps = ("make vllm-venv", 'make "$AIS_BENCH_VENV/.installed"', "left=$(within", 'test_vllm "$left"')
    at = [script.index(step) for step in steps]
    assert at == sorted(at)  # downloads take none of the tests' time
