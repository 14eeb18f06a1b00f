"""Makes `.venv` with everything in it. Standard library only, run by path, before anything is installed.

    python3 -I engine_adapter/cluster/install.py --venv .venv --stamp .venv/.installed

Four steps, each said when it begins: system libraries (Mooncake's wheel needs three, relaying and copying a C
compiler; by apt, as root or with a sudo that asks nothing, otherwise it says what is missing), the virtual environment,
the packages, Mooncake's wheel. Without Mooncake the shared-memory transport does the work, and without a compiler
Python does the work, so their absence is said and is no error.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parents[2]
MOONCAKE_LIBRARIES = {
    "libibverbs.so.1": ("libibverbs1",),
    "libnuma.so.1": ("libnuma1",),
    "libcurl.so.4": ("libcurl4t64", "libcurl4"),
}
"""What `mooncake.engine` links and its wheel does not bring, and the packages that have it: the name of newer Debian
and Ubuntu first."""
COMPILER = ("gcc", "libc6-dev")
"""For the proxy's relay thread and the sidecar's copying (proxy/native, sidecar/native)."""
MOONCAKE_MACHINES = ("x86_64", "aarch64")
LOUD_DOWNLOAD = " MB)"
"""How pip ends the line of a download worth mentioning."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the virtual environment with everything in it.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--stamp", type=Path, required=True, help="touched when all is done")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST:
        return fail(f"Python 3.11 or newer is needed, this is {platform.python_version()}; make PYTHON=python3.12 ...")
    begun = time.monotonic()
    say("1/4 system libraries")
    install_system_packages()
    say(f"2/4 virtual environment {arguments.venv} (Python {platform.python_version()})")
    if not make_environment(arguments.venv):
        return 1
    python = arguments.venv / "bin" / "python"
    log = arguments.venv / "install.log"
    say(f"3/4 packages (all of pip's words: {log})")
    log.write_text("")
    if not install_packages(python, log):
        return fail(f"pip could not install the packages; {log} has all it said")
    say("4/4 Mooncake")
    install_mooncake(python, log)
    arguments.stamp.touch()
    say(f"installed in {time.monotonic() - begun:.0f} s")
    return 0


def say(text: str) -> None:
    print(f"install: {text}", flush=True)


def fail(text: str) -> int:
    print(f"install: {text}", file=sys.stderr)
    return 1


# --- system libraries


def missing_libraries() -> list[str]:
    return [name for name in MOONCAKE_LIBRARIES if not loads(name)]


def loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def venv_package() -> str | None:
    """Debian's package without which `python -m venv` fails, if that is so here."""
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        return None
    return f"python{sys.version_info.major}.{sys.version_info.minor}-venv"


def has_compiler() -> bool:
    """Whether setuptools will find the one that it uses."""
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(str(named).split()[0]) is not None


def install_system_packages() -> None:
    missing = missing_libraries() if platform.machine() in MOONCAKE_MACHINES else []
    packages = [package for package in (venv_package(),) if package]
    if sys.platform == "linux" and not has_compiler():
        packages += COMPILER
    if not missing and not packages:
        say("    all there")
        return
    as_root = root_prefix()
    if not shutil.which("apt-get") or as_root is None:
        names = " ".join([*packages, *(MOONCAKE_LIBRARIES[name][-1] for name in missing)])
        say(f"    missing: {names}; install them as root (apt-get install {names})")
    else:
        apt_install(as_root, packages, missing)
    if not has_compiler():
        say("    without a C compiler Python passes every token on and copies every block: slower, and it works")
    if missing_libraries() and missing:
        say("    without them Mooncake stays out, and KV moves through shared memory alone")


def root_prefix() -> list[str] | None:
    """What to put before a command to run it as root, or None if that would ask for a password."""
    if os.geteuid() == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return [sudo, "-n"]
    return None


def apt_install(as_root: list[str], packages: list[str], libraries: list[str]) -> None:
    apt = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    say("    apt-get update")
    subprocess.run([*apt, "update"], stdout=subprocess.DEVNULL, check=False)
    wanted = packages + [next((p for p in MOONCAKE_LIBRARIES[name] if apt_has(p)), "") for name in libraries]
    wanted = [package for package in wanted if package]
    say(f"    apt-get install {' '.join(wanted)}")
    command = [*apt, "install", "-y", "--no-install-recommends", *wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        say(f"    apt-get failed: {(done.stdout.strip().splitlines() or ['?'])[-1]}")


def apt_has(package: str) -> bool:
    command = ["apt-cache", "show", "--no-all-versions", package]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- the environment and what is in it


def make_environment(venv: Path) -> bool:
    if (venv / "bin" / "pip").exists() and works(venv / "bin" / "python"):
        return True
    package = venv_package()
    if package:
        fail(f"this Python cannot make virtual environments: apt-get install {package} (or python3-venv)")
        return False
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=False)
    return done.returncode == 0


def works(python: Path) -> bool:
    code = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([str(python), "-c", code], check=False).returncode == 0
    except OSError:
        return False


def install_packages(python: Path, log: Path) -> bool:
    return pip(python, log, "--editable", f"{ROOT}[dev]")


def requirement(name: str) -> str:
    """As pyproject.toml has it; by pattern, because tomllib is younger than the Pythons that are told they are old."""
    found = re.search(rf'"({re.escape(name)}[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert found, name
    return found[1]


def install_mooncake(python: Path, log: Path) -> None:
    if sys.platform != "linux" or platform.machine() not in MOONCAKE_MACHINES:
        say(f"    no wheel for {sys.platform} on {platform.machine()}; going on with shared memory alone")
        return
    if not pip(python, log, requirement("mooncake-transfer-engine")):
        say("    its wheel could not be installed; going on with shared memory alone")
        return
    tried = subprocess.run([str(python), "-c", "import mooncake.engine"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        reason = (tried.stderr.strip().splitlines() or ["?"])[-1]
        say(f"    installed and does not load ({reason}); going on with shared memory alone")


def pip(python: Path, log: Path, *words: str) -> bool:
    """`pip install`, its long story in the log, what takes long on the screen."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *words]
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("a") as full, subprocess.Popen(command, text=True, env=environment, **streams) as process:
        assert process.stdout is not None
        for line in process.stdout:
            full.write(line)
            said = worth_saying(line)
            if said:
                say(f"    {said}")
    return process.returncode == 0


def worth_saying(line: str) -> str | None:
    """What of pip's line a waiting person wants to see."""
    line = line.strip()
    if line.startswith("Downloading ") and line.endswith(LOUD_DOWNLOAD):
        wheel, _, size = line.removeprefix("Downloading ").partition(" ")
        return f"downloading {'-'.join(wheel.rpartition('/')[2].split('-')[:2])} {size}"
    if line.startswith("Installing collected packages:"):
        return f"installing {line.count(',') + 1} packages"
    if line.startswith("ERROR:"):
        return line
    return None


if __name__ == "__main__":
    sys.exit(main())
