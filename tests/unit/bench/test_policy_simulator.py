from __future__ import annotations

import dataclasses

import pytest

from bench.policy_simulator import Outcome, main, misses, outcome_of, quantile
from proxy.scheduling import POLICIES


def test_least_load_beats_the_seeds_formula_and_chance(capsys: pytest.CaptureFixture[str]) -> None:
    """A short run of the benchmark's own bar: p99 TTFT below both at both loads, p99 TPOT no worse."""
    argv = "--check --requests 1500 --seeds 5 6 7 8 --policies least_load ascend random"
    status = main(argv.split())
    said = capsys.readouterr()
    assert status == 0, said.err
    assert len(said.out.splitlines()) == 1 + 2 * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_simulated_again_with_the_same_outcome(policy: str) -> None:
    """Loads that do not return to zero fail in `outcome_of`."""
    one, other = (outcome_of(policy, 0.8, 300, [3]) for _ in range(2))
    assert one == other
    assert 0 < one.ttft_p50 < one.ttft_p99 and 0 < one.tpot_p50 < one.tpot_p99


def test_the_check_names_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    good = Outcome(100, 1000, 20, 30, 0.7, 0)
    bad = dataclasses.replace(good, ttft_p99=1001)
    assert misses({"least_load": good, "ascend": bad, "random": bad}) == []
    (line,) = misses({"least_load": good, "ascend": good, "random": bad})
    assert "p99 TTFT" in line and "ascend" in line
    (line,) = misses({"least_load": good, "ascend": bad, "random": dataclasses.replace(bad, tpot_p99=29)})
    assert "p99 TPOT" in line and "random" in line
    with pytest.raises(SystemExit) as caught:
        main(["--check", "--policies", "least_load"])
    assert caught.value.code == 2 and "ascend, random" in capsys.readouterr().err


def test_quantiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.99)) == (50, 99, 7)
