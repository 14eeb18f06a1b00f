"""What every policy of the registry must do, whatever it prefers. A new one is picked up by itself."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from proxy.load_ledger import InstanceLoad
from proxy.scheduling import POLICIES, Policy, Prefix, make_policy
from proxy.scheduling.cost import expected_wait
from tests.unit.proxy.scheduling.fleet import Chooser, Stub, StubAsk, fleet

POLICY = pytest.mark.parametrize("name", POLICIES)
ROLE = pytest.mark.parametrize("role", ["prefill", "decode"])


def some_ask(rng: random.Random) -> tuple[int, StubAsk]:
    num_tokens = int(rng.lognormvariate(6, 1)) + 64
    conversation = rng.randrange(500)
    keys = tuple(conversation << 10 | chunk for chunk in range(rng.randrange(8)))
    return num_tokens, StubAsk(num_tokens * 4, b"user %d" % conversation, Prefix(keys, 256.0))


def served(by: Policy | Chooser, some: list[Stub], num: int, seed: int = 1, max_open: int = 16) -> list[str]:
    """The keys picked for `num` requests, of which so many are open at once; all of them end."""
    rng, chooser = random.Random(seed), by if isinstance(by, Chooser) else Chooser(by)
    picks = []
    for _ in range(num):
        picks.append(chooser.choose([one for one in some if one.enabled], *some_ask(rng)).key)
        if len(chooser.open) >= max_open:
            chooser.end(rng.randrange(max_open))
    while chooser.open:
        chooser.end()
    return picks


@POLICY
@ROLE
def test_it_is_registered_under_its_name_and_says_what_it_does(name: str, role: str) -> None:
    policy = make_policy(name, role)
    assert policy.name == name and policy.role == role
    doc = type(policy).__doc__ or ""
    assert "score" in doc, "the docstring has the formula, with units"


@POLICY
@ROLE
def test_it_picks_what_is_offered_and_changes_no_load(name: str, role: str) -> None:
    policy, rng = make_policy(name, role, seed=1), random.Random(2)
    some = fleet(7)
    some[3].load.reserve(50)
    for _ in range(300):
        offered = rng.sample(some, rng.randint(1, 7))
        num_tokens, ask = some_ask(rng)
        assert policy.pick(offered, num_tokens, ask) in offered
    assert [one.load.num_tokens for one in some] == [0, 0, 0, 50, 0, 0, 0]
    assert not any(one.load.policy_load or one.load.total_requests for one in some if one is not some[3])


@POLICY
@ROLE
def test_one_candidate_is_taken_whatever_it_is(name: str, role: str) -> None:
    policy, (one,) = make_policy(name, role), fleet(1)
    one.load.reserve(10**9)
    one.load.observe(1, 100.0)
    one.health.failed(0.0, "refused")
    for seed in range(20):
        assert policy.pick([one], *some_ask(random.Random(seed))) is one


@POLICY
@ROLE
def test_it_is_repeatable_under_a_seed(name: str, role: str) -> None:
    first, again = (served(make_policy(name, role, seed=7), fleet(5), 500) for _ in range(2))
    assert first == again


@POLICY
@ROLE
def test_no_instance_starves(name: str, role: str) -> None:
    counts = Counter(served(make_policy(name, role, seed=3), fleet(8), 4000))
    assert len(counts) == 8 and min(counts.values()) > 4000 / 8 / 4, counts


@POLICY
@ROLE
def test_loads_return_to_zero(name: str, role: str) -> None:
    some = fleet(4)
    served(make_policy(name, role, seed=4), some, 1000, max_open=40)
    left = [(one.load.num_requests, one.load.num_tokens, one.load.policy_load) for one in some]
    assert left == [(0, 0, 0)] * 4
    assert sum(one.load.total_requests for one in some) == 1000


@POLICY
@ROLE
def test_an_instance_that_was_disabled_or_left_comes_back(name: str, role: str) -> None:
    chooser, some = Chooser(make_policy(name, role, seed=5)), fleet(4)
    served(chooser, some, 300)
    some[2].enabled = False
    assert some[2].key not in served(chooser, some, 300, seed=2)
    some[2].enabled = True
    assert some[2].key in served(chooser, some, 300, seed=3)
    gone = some.pop(1)
    assert gone.key not in served(chooser, some, 300, seed=4)
    some.append(Stub(gone.key))  # the same address, another instance
    counts = Counter(served(chooser, some, 300, seed=5))
    assert gone.key in counts and len(counts) == 4


class _Counted(Stub):
    """Counts what a policy looks at."""

    num_looks = 0

    def __getattribute__(self, name: str) -> object:
        if name in ("load", "key", "health", "enabled"):
            _Counted.num_looks += 1
        return super().__getattribute__(name)


@POLICY
@ROLE
def test_its_work_grows_no_faster_than_the_number_of_candidates(name: str, role: str) -> None:
    looks = {}
    for num in (16, 256):
        policy, rng = make_policy(name, role, seed=6), random.Random(7)
        some = [_Counted(f"10.0.0.{number}:8000") for number in range(num)]
        asks = [some_ask(rng) for _ in range(50)]
        _Counted.num_looks = 0
        for num_tokens, ask in asks:
            policy.pick(some, num_tokens, ask)
        looks[num] = _Counted.num_looks / 50
    assert looks[256] <= 16 * 1.5 * max(looks[16], 1), looks
    assert looks[256] <= 8 * 256, looks


@POLICY
@ROLE
def test_what_it_holds_is_given_back_once(name: str, role: str) -> None:
    policy, load = make_policy(name, role), InstanceLoad()
    if not policy.holds:
        return
    holds = [policy.hold(load, StubAsk(body_bytes=size)) for size in (1, 999, 14_000, 3)]
    assert load.policy_load > 0
    for hold in (*holds, *holds):
        hold.release()
    assert load.policy_load == 0


@POLICY
@ROLE
def test_it_says_why(name: str, role: str) -> None:
    policy, some, rng = make_policy(name, role, seed=9), fleet(4), random.Random(10)
    for number, one in enumerate(some):
        one.load.reserve(100 * number)
    for _ in range(50):
        num_tokens, ask = some_ask(rng)
        picked = policy.pick(some, num_tokens, ask)
        decided_by, wait_s, next_wait_s = policy.reason(some, picked, num_tokens)
        waits = {one.key: expected_wait(role, one.load, num_tokens) for one in some}
        assert decided_by in (name, "least_load", "prefix")
        assert wait_s == waits.pop(picked.key) and next_wait_s == min(waits.values())
    num_tokens, ask = some_ask(rng)
    picked = policy.pick(some[:1], num_tokens, ask)
    assert policy.reason(some[:1], picked, num_tokens) == (
        "only_one", expected_wait(role, picked.load, num_tokens), None,
    )  # fmt: skip
