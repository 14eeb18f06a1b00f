"""The lease table, walked completely, and its rules as transcripts."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sidecar.errors import Refusal
from sidecar.leases import FINAL, MAX_REMEMBERED, TRANSITIONS, Claimant, Happening, LeaseTable, Reader, State

ALICE, ALICE_AGAIN, BOB = Claimant("alice", 1), Claimant("alice", 2), Claimant("bob", 3)
FIRST, SECOND = Reader("request", 0, 2), Reader("request", 1, 2)


def table(max_leases: int = 100_000) -> LeaseTable:
    return LeaseTable(claim_ttl_s=5.0, max_claim_s=20.0, max_leases=max_leases)


def offered(ttl_s: float = 30.0) -> LeaseTable:
    leases = table()
    leases.offer("t", "secret", "r", [1, 2], 32, ttl_s, 0.0)
    return leases


def claimed() -> LeaseTable:
    leases = offered()
    leases.claim("t", "secret", ALICE, 0.0)
    return leases


def shared() -> LeaseTable:
    """Claimed by two ranks of one engine."""
    leases = offered()
    leases.claim("t", "secret", ALICE, 0.0, FIRST)
    leases.claim("t", "secret", ALICE_AGAIN, 0.0, SECOND)
    return leases


def ended(*how: Callable[[LeaseTable], object]) -> LeaseTable:
    leases = claimed()
    for step in how:
        step(leases)
    leases.take_ended()
    return leases


IN_STATE: dict[State, Callable[[], LeaseTable]] = {
    State.OFFERED: offered,
    State.CLAIMED: claimed,
    State.CONSUMED: lambda: ended(lambda t: t.consume("t", "secret", ALICE, 1.0)),
    State.DROPPED: lambda: ended(lambda t: t.drop("t", "secret", "alice", 1.0)),
    State.EXPIRED: lambda: ended(lambda t: t.expire(1000.0)),
    State.REVOKED: lambda: ended(lambda t: t.revoke("t")),
}
ACT: dict[Happening, Callable[[LeaseTable], object]] = {
    Happening.CLAIM: lambda t: t.claim("t", "secret", ALICE_AGAIN, 1.0),
    Happening.HEARTBEAT: lambda t: t.heartbeat("t", "secret", ALICE, 1.0),
    Happening.CONSUME: lambda t: t.consume("t", "secret", ALICE, 1.0),
    Happening.LEAVE: lambda t: t.give_back("t", "secret", ALICE, 1.0),
    Happening.RETURN: lambda t: t.give_back("t", "secret", ALICE, 1.0),
    Happening.DROP: lambda t: t.drop("t", "secret", "alice", 1.0),
    Happening.EXPIRE: lambda t: t.expire(1000.0),
    Happening.REVOKE: lambda t: t.revoke("t"),
}


@pytest.mark.parametrize("happening", Happening)
@pytest.mark.parametrize("state", State)
def test_every_cell_of_the_table(state: State, happening: Happening) -> None:
    leases = shared() if (state, happening) == (State.CLAIMED, Happening.LEAVE) else IN_STATE[state]()
    after = TRANSITIONS.get((state, happening))
    if after is None:
        quiet = happening in (Happening.EXPIRE, Happening.REVOKE) and state in FINAL
        if quiet:
            ACT[happening](leases)
        else:
            with pytest.raises(Refusal):
                ACT[happening](leases)
        assert leases.take_ended() == []
        assert len(leases) == (0 if state in FINAL else 1)
        return
    ACT[happening](leases)
    if after in FINAL:
        assert leases.take_ended() == [("t", after)] and len(leases) == 0
    else:
        assert leases.take_ended() == [] and leases.count(after) == 1


def test_final_states_lead_nowhere() -> None:
    assert not [cell for cell in TRANSITIONS if cell[0] in FINAL]


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(Refusal) as refusal:
        act()
    assert refusal.value.message
    return refusal.value.reason


def test_reasons() -> None:
    leases = claimed()
    assert refused(lambda: leases.claim("no", "secret", ALICE, 0.0)) == "unknown"
    assert refused(lambda: leases.claim("t", "guess", ALICE, 0.0)) == "wrong_token"
    assert refused(lambda: leases.claim("t", "", ALICE, 0.0)) == "wrong_token"
    for act in (leases.claim, leases.heartbeat, leases.consume, leases.give_back):
        assert refused(lambda act=act: act("t", "secret", BOB, 0.0)) == "wrong_engine"  # type: ignore[misc]
    assert refused(lambda: leases.drop("t", "secret", "bob", 0.0)) == "wrong_engine"
    leases.consume("t", "secret", ALICE, 1.0)
    assert refused(lambda: leases.claim("t", "secret", ALICE, 1.0)) == "released"


def test_an_offer_expires_at_its_time_and_not_before() -> None:
    leases = offered(ttl_s=10.0)
    assert leases.next_expiry() == 10.0
    leases.expire(9.99)
    assert len(leases) == 1
    leases.expire(10.0)
    assert leases.take_ended() == [("t", State.EXPIRED)]
    assert refused(lambda: leases.claim("t", "secret", ALICE, 11.0)) == "expired"
    assert leases.next_expiry() is None


def test_a_late_claim_expires_the_lease_even_before_the_timer() -> None:
    leases = offered(ttl_s=10.0)
    assert refused(lambda: leases.claim("t", "secret", ALICE, 10.0)) == "expired"
    assert leases.take_ended() == [("t", State.EXPIRED)]


def test_a_claim_just_in_time_lasts_its_own_time_and_heartbeats_extend_it() -> None:
    leases = offered(ttl_s=10.0)
    assert leases.claim("t", "secret", ALICE, 9.0).expires_at == 14.0
    leases.expire(12.0)
    assert leases.heartbeat("t", "secret", ALICE, 12.0).expires_at == 17.0
    leases.expire(16.9)
    leases.expire(17.0)
    assert leases.take_ended() == [("t", State.EXPIRED)]
    assert refused(lambda: leases.consume("t", "secret", ALICE, 17.0)) == "expired"


def test_heartbeats_do_not_carry_a_claim_beyond_its_longest_time() -> None:
    leases = offered(ttl_s=1.0)
    leases.claim("t", "secret", ALICE, 0.0)
    for now in range(1, 20):
        leases.heartbeat("t", "secret", ALICE, float(now))
    assert leases.heartbeat("t", "secret", ALICE, 19.9).expires_at == 20.0
    assert refused(lambda: leases.heartbeat("t", "secret", ALICE, 20.0)) == "expired"


def test_a_lost_connection_gives_its_leases_back_to_the_offer_s_time() -> None:
    leases = offered(ttl_s=10.0)
    leases.offer("u", "secret", "r", [], 0, 3.0, 0.0)
    leases.claim("t", "secret", ALICE, 1.0)
    leases.claim("u", "secret", ALICE, 1.0)
    leases.connection_lost(BOB.connection_id, 2.0)
    assert leases.count(State.CLAIMED) == 2
    leases.connection_lost(ALICE.connection_id, 5.0)
    assert leases.take_ended() == [("u", State.EXPIRED)]
    assert leases.claim("t", "secret", BOB, 6.0).claimant == BOB
    leases.connection_lost(BOB.connection_id, 7.0)
    leases.expire(10.0)
    assert leases.take_ended() == [("t", State.EXPIRED)]


def test_a_claim_moved_to_a_new_connection_survives_the_old_one() -> None:
    leases = claimed()
    leases.claim("t", "secret", ALICE_AGAIN, 1.0)
    leases.connection_lost(ALICE.connection_id, 2.0)
    leases.consume("t", "secret", ALICE_AGAIN, 3.0)


def test_void_ends_everything() -> None:
    leases = claimed()
    leases.offer("u", "secret", "r", [], 0, 3.0, 0.0)
    assert sorted(leases.void()) == ["t", "u"]
    assert sorted(leases.take_ended()) == [("t", State.REVOKED), ("u", State.REVOKED)]
    assert leases.take_ended() == []


def test_limits() -> None:
    leases = table(max_leases=2)
    for name in ("a", "b"):
        leases.offer(name, "s", "r", [], 0, 1.0, 0.0)
    assert refused(lambda: leases.offer("c", "s", "r", [], 0, 1.0, 0.0)) == "invalid"
    leases.revoke("a")
    leases.offer("c", "s", "r", [], 0, 1.0, 0.0)


def test_what_ended_is_remembered_up_to_a_limit() -> None:
    leases = table()
    for number in range(MAX_REMEMBERED + 1):
        leases.offer(f"{number}", "s", "r", [], 0, 1.0, 0.0)
    leases.expire(2.0)
    reasons = {refused(lambda n=n: leases.claim(f"{n}", "s", ALICE, 2.0)) for n in range(MAX_REMEMBERED + 1)}  # type: ignore[misc]
    assert reasons == {"expired", "unknown"}
    assert len(leases._remembered) == MAX_REMEMBERED and not leases._expiries


def test_a_lease_ends_when_its_last_reader_has_read() -> None:
    leases = shared()
    leases.consume("t", "secret", ALICE, 1.0)
    assert leases.take_ended() == [] and leases.count(State.CLAIMED) == 1
    assert refused(lambda: leases.consume("t", "secret", ALICE, 1.0)) == "unknown"
    leases.consume("t", "secret", ALICE_AGAIN, 2.0)
    assert leases.take_ended() == [("t", State.CONSUMED)]


def test_readers_may_come_one_after_the_other_and_late_ones_get_a_claim_s_time() -> None:
    leases = offered(ttl_s=3.0)
    leases.claim("t", "secret", ALICE, 2.0, SECOND)
    leases.consume("t", "secret", ALICE, 2.5)
    assert leases.count(State.OFFERED) == 1
    leases.expire(6.9)
    leases.claim("t", "secret", ALICE_AGAIN, 6.9, FIRST)
    leases.consume("t", "secret", ALICE_AGAIN, 11.8)
    assert leases.take_ended() == [("t", State.CONSUMED)]


def test_a_reader_that_never_comes_holds_nothing_beyond_the_last_claim_s_time() -> None:
    leases = offered(ttl_s=3.0)
    leases.claim("t", "secret", ALICE, 2.0, SECOND)
    leases.consume("t", "secret", ALICE, 2.5)
    leases.expire(leases.next_expiry() or 0.0)
    leases.expire(7.0)
    assert leases.take_ended() == [("t", State.EXPIRED)]


def test_a_reader_that_fails_can_come_again_and_only_then_is_it_consumed() -> None:
    leases = shared()
    leases.give_back("t", "secret", ALICE, 1.0)
    leases.consume("t", "secret", ALICE_AGAIN, 1.0)
    assert leases.take_ended() == [] and leases.count(State.OFFERED) == 1
    leases.claim("t", "secret", ALICE, 2.0, FIRST)
    leases.claim("t", "secret", ALICE_AGAIN, 2.0, FIRST)  # over a new connection
    leases.connection_lost(ALICE.connection_id, 2.5)
    leases.consume("t", "secret", ALICE_AGAIN, 3.0)
    assert leases.take_ended() == [("t", State.CONSUMED)]


def test_a_lost_reader_leaves_the_others_reading() -> None:
    leases = shared()
    leases.connection_lost(ALICE.connection_id, 1.0)
    assert leases.count(State.CLAIMED) == 1
    leases.connection_lost(ALICE_AGAIN.connection_id, 1.0)
    assert leases.count(State.OFFERED) == 1 and leases.take_ended() == []


def test_another_group_begins_anew_but_not_while_one_reads() -> None:
    leases = shared()
    leases.consume("t", "secret", ALICE, 1.0)
    for claimant, reader in ((BOB, FIRST), (ALICE, Reader("other", 0, 2)), (ALICE, Reader("request", 0, 3))):
        assert refused(lambda c=claimant, r=reader: leases.claim("t", "secret", c, 1.0, r)) == "wrong_engine"  # type: ignore[misc]
    leases.give_back("t", "secret", ALICE_AGAIN, 1.0)
    leases.claim("t", "secret", BOB, 2.0, SECOND)
    leases.consume("t", "secret", BOB, 2.0)
    assert leases.take_ended() == []  # what Alice's first rank has read does not count
    leases.claim("t", "secret", BOB, 2.0, FIRST)
    leases.consume("t", "secret", BOB, 2.0)
    assert leases.take_ended() == [("t", State.CONSUMED)]


@pytest.mark.parametrize("reader", [Reader("r", 2, 2), Reader("r", 0, 0), Reader("r", 0, 10**9)], ids=str)
def test_a_reader_of_nonsense_is_refused(reader: Reader) -> None:
    leases = offered()
    assert refused(lambda: leases.claim("t", "secret", ALICE, 0.0, reader)) == "invalid"
    assert leases.count(State.OFFERED) == 1


@pytest.mark.parametrize("seed", range(200))
def test_whatever_readers_do_a_lease_ends_once_and_never_before_all_of_a_group_have_read(seed: int) -> None:
    """Against a model that only remembers who has confirmed a read, and for which request."""
    dice = random.Random(seed)
    leases = offered(ttl_s=dice.uniform(1, 30))
    groups = [
        (engine, f"request-{number}", dice.randint(1, 3)) for number, engine in enumerate(("alice", "alice", "bob"))
    ]
    reading: dict[int, tuple[tuple[str, str, int], int]] = {}
    have_read: dict[tuple[str, str, int], set[int]] = {group: set() for group in groups}
    now, ended = 0.0, []
    for connection in range(80):
        now += dice.choice((0.0, 0.2, 2.0))
        group = dice.choice(groups)
        index = dice.randrange(group[2])
        act = dice.choice(("claim", "claim", "consume", "consume", "give_back", "heartbeat", "lost", "expire"))
        try:
            if act == "claim":
                leases.claim("t", "secret", Claimant(group[0], connection), now, Reader(group[1], index, group[2]))
                assert {other for other, _ in reading.values()} <= {group}, "two requests read at once"
                for other in groups:
                    have_read[other] = have_read[other] - {index} if other == group else set()
                reading = {held: taken for held, taken in reading.items() if taken[1] != index}
                reading[connection] = (group, index)
            elif act == "expire":
                leases.expire(now)
            elif reading:
                held = dice.choice(list(reading))
                claimant = Claimant(reading[held][0][0], held)
                if act == "lost":
                    leases.connection_lost(held, now)
                else:
                    getattr(leases, act)("t", "secret", claimant, now)
                if act == "consume":
                    have_read[reading[held][0]].add(reading[held][1])
                if act != "heartbeat":
                    del reading[held]
        except Refusal as refusal:
            assert refusal.reason in ("wrong_engine", "expired", "released")
        ended += leases.take_ended()
        if ended:
            break
        assert len(leases) == 1 and leases.count(State.CLAIMED) == bool(reading)
    if not ended:
        leases.expire(now + 100.0)
        ended += leases.take_ended()
        assert ended == [("t", State.EXPIRED)]
    [(_, state)] = ended
    complete = any(len(read) == group[2] for group, read in have_read.items())
    assert (state is State.CONSUMED) == complete
    assert len(leases) == 0 and leases.next_expiry() is None
