from __future__ import annotations

from pathlib import Path

from tests.unit.proxy.failures_page import rendered

PAGE = Path(__file__).parents[3] / "docs" / "failures.md"


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == rendered(), "python -m tests.unit.proxy.failures_page > docs/failures.md"
