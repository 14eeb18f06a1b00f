"""The soak of `bench.proxy_soak`, a quarter of a minute of it: right answers, nothing left open, nothing that grows."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.timeout(150)
def test_a_short_soak_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "bench.proxy_soak", "--minutes", "0.3", "--share", "0.3", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = dict(word.split("=") for line in done.stdout.splitlines() if "streamed=" in line for word in line.split())
    for kind in ("whole", "streamed", "left_before_the_answer", "left_in_the_answer", "left_in_the_request"):
        assert int(counted[kind]) > 5, counted
