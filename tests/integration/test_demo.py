"""What `make demo` runs, with the example's own file: real engines, sidecars and proxy, started by one command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def processes_of(directory: Path) -> list[str]:
    """Command lines of living processes that were started in `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")) == directory:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def test_the_demonstration_answers_shows_what_moved_and_leaves_nothing(tmp_path: Path) -> None:
    example = (ROOT / "configs/examples/1p1d-cpu.toml").read_text()
    (tmp_path / "tiny.toml").write_text(example.replace('"small"', '"tiny"').replace('"1p1d-cpu"', '"demo-test"'))
    command = [sys.executable, "-m", "engine_adapter.cluster.cli", "demo", "tiny.toml", "--once", "--port", "0"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
        timeout=150,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout
    assert re.search(r"^assistant: .*\w", text, re.MULTILINE)
    (num_prompt_tokens,) = map(int, re.findall(r"^prompt tokens +(\d+)", text, re.MULTILINE))
    ((num_bytes, num_blocks),) = re.findall(r"^KV moved +([\d,]+) bytes in (\d+) blocks", text, re.MULTILINE)
    assert int(num_blocks) == -(-(num_prompt_tokens - 1) // 16), "all but the last prompt token, in blocks of 16"
    assert int(num_bytes.replace(",", "")) % int(num_blocks) == 0
    assert re.search(r"^  from +demo-test-prefill-0@127\.0\.0\.1:\d+$", text, re.MULTILINE)
    assert re.search(r"^  to +demo-test-decode-0@127\.0\.0\.1:\d+$", text, re.MULTILINE)
    assert re.search(r"^  over +shm$", text, re.MULTILINE)
    assert re.search(r"^TTFT +[\d.]+ ms\nTPOT +[\d.]+ ms$", text, re.MULTILINE)
    assert "  curl -N http://127.0.0.1:" in text
    assert processes_of(tmp_path) == []
