"""What the engines wrote down becomes a verdict; the engines themselves are the benchmark's own business."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.layerwise_engines import Times, Trace, report


def test_a_trace_is_taken_prompt_by_prompt_and_the_last_mark_counts(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    with trace.path.open("a") as file:
        file.write("land 1000000000\nmarked 2000000000\nmarked 3000000000\narrived 5000000000\ncomputed 4000000000\n")
        file.flush()
        assert trace.take("land", "marked", "computed", "arrived") == pytest.approx([1, 3, 4, 5])
        file.write("pull 6000000000\nfailed 7000000000\n")
        file.flush()
        with pytest.raises(SystemExit, match="failed"):
            trace.take("pull")


def test_what_is_there_early_is_wholly_hidden_and_what_is_late_may_be_worse_than_a_pull() -> None:
    assert Times(0.004, 0.02, -0.01, 0.002).hidden == 1
    assert Times(0.004, 0.02, 0.001, 0.002).hidden == pytest.approx(0.75)
    assert Times(0.004, 0.02, 0.006, 0.006).hidden == pytest.approx(-0.5)


def test_the_median_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    early, late = Times(0.004, 0.02, -0.01, 0.002), Times(0.004, 0.02, 0.001, 0.002)
    assert report(1, [early, early, late], 0.8)
    assert not report(4, [early, late, late], 0.8)
    fine, bad = capsys.readouterr().out.splitlines()
    assert "in 1 chunk:" in fine and "10.00 ms before" in fine and fine.endswith("hidden 100%")
    assert "in 4 chunks:" in bad and "1.00 ms after" in bad and bad.endswith("hidden 75%  below the bar of 80%")
