"""The status page, in a real browser where there is one."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proxy_blackbox.harness import CHAT, HOST, Engines, Proxy, body_of, eventually

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
EVIL = "<script>alert(1)<script>"


def seen(proxy: Proxy, directory: Path, path: str = "/status") -> str:
    """The page as a browser has it a few seconds of its own time later."""
    done = subprocess.run(
        [
            str(CHROMIUM), *FLAGS, f"--user-data-dir={directory / 'profile'}", "--virtual-time-budget=5000",
            "--dump-dom", f"http://{HOST}:{proxy.port}{path}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of each instance's row, by its address."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return {html.unescape(cells[1]): [html.unescape(cell) for cell in cells] for cells in rows if len(cells) > 1}


@pytest.mark.parametrize("path", ["/", "/status"])
def test_it_is_one_page_that_loads_nothing_from_elsewhere(path: str, proxy: Proxy) -> None:
    answer = proxy.get(path)
    page = answer.body.decode()
    assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"https?://|src=|@import|url\(|innerHTML|insertAdjacent|document\.write|eval\(", page)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert page.count("<script") == page.count("<style") == 1


def test_by_another_method_it_is_refused(proxy: Proxy) -> None:
    assert proxy.post("/status", {}).status == 405


@NEEDS_CHROMIUM
def test_a_browser_shows_the_instances_and_sums(
    start_proxy: Callable[..., Proxy], engines: Engines, tmp_path: Path
) -> None:
    proxy = start_proxy("--health-interval-s", "0.1", "--policy", "round_robin")
    for _ in range(4):
        assert proxy.post(CHAT, body_of(CHAT)).status == 200
    engines.fault("prefill", "status", status=500)  # one of each prefiller
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    engines.stop(engines.decode[0])
    down = f"{HOST}:{engines.decode[0]}"

    def well() -> bool:
        told = proxy.get("/instances").json["instances"]
        return any(one["healthy"] for one in told if one["address"] == down)

    eventually(well, "it is not out", 15)
    page = seen(proxy, tmp_path, "/")
    rows = rows_of(page)
    assert set(rows) >= {f"{HOST}:{port}" for port in (*engines.prefill, *engines.decode)}
    assert rows[down][0] == "decode" and rows[down][2:4] == ["active", "out"] and "refused" in rows[down][-1].lower()
    assert rows[f"{HOST}:{engines.decode[1]}"][3] == "well"
    assert "1 of 2" in page and "2 of 2" in page and re.search(r'id="told"[^>]*>As of ', page)
    sums = [re.findall(r"<td[^>]*>(.*?)</td>", foot) for foot in re.findall(r"<tfoot>(.*?)</tfoot>", page)]
    assert [cells[0] for cells in sums] == ["Sum of 2", "Sum of 2"]
    assert [cells[-3] for cells in sums] == ["7", "5"], sums
    assert sums[0][-2] == "2"
    engines.start(engines.decode[0])


@NEEDS_CHROMIUM
def test_a_browser_runs_nothing_that_a_value_holds(start_proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    proxy = start_proxy()
    proxy.post("/instances/add", {"type": "decode", "instances": f"{EVIL}:8000"})
    proxy.post("/instances/add", {"type": "prefill", "instances": "<img/src=x>:8000"})
    eventually(lambda: not any(one["last_error"] for one in proxy.get("/instances").json["waiting"]), "no error", 15)
    page = seen(proxy, tmp_path)
    row = rows_of(page)[f"{EVIL}:8000"]
    assert row[2] == "waiting" and EVIL in row[-1]
    assert page.count("<script") == 1 and "<img" not in page and html.escape(EVIL) in page
