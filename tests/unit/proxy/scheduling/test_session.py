from __future__ import annotations

from collections import Counter

import pytest

from proxy.scheduling.session import MAX_KNOWN_INSTANCES, Session, session_key_of
from tests.unit.proxy.scheduling.fleet import Stub, StubAsk, fleet

SESSIONS = [StubAsk(session_key=b"session %d" % number) for number in range(1000)]


def test_a_session_stays_whatever_the_load() -> None:
    some = fleet(8)
    first = {ask: Session("decode").pick(some, 1, ask) for ask in SESSIONS}
    for one in some[:4]:
        one.load.reserve(10**6)
    policy = Session("decode")  # another process
    assert all(policy.pick(some[::-1], 1, ask) is first[ask] for ask in SESSIONS)


def test_sessions_spread() -> None:
    policy, some = Session("decode"), fleet(8)
    counts = Counter(policy.pick(some, 1, ask).key for ask in SESSIONS)
    assert all(85 < counts[one.key] < 165 for one in some), counts


def test_when_an_instance_is_out_only_its_own_sessions_move_and_to_all_others() -> None:
    policy, some = Session("decode"), fleet(8)
    before = {ask: policy.pick(some, 1, ask) for ask in SESSIONS}
    rest = [one for one in some if one is not some[3]]
    after = {ask: policy.pick(rest, 1, ask) for ask in SESSIONS}
    assert all(after[ask] is before[ask] for ask in SESSIONS if before[ask] is not some[3])
    assert {after[ask] for ask in SESSIONS if before[ask] is some[3]} == set(rest)
    assert {ask: policy.pick(some, 1, ask) for ask in SESSIONS} == before  # and come back


def test_without_a_session_it_is_least_load() -> None:
    policy, (a, b) = Session("prefill"), fleet(2)
    a.load.reserve(1000)
    assert policy.pick([a, b], 10, StubAsk()) is b


def test_what_it_knows_of_instances_is_bounded() -> None:
    policy = Session("decode")
    for start in range(0, 3 * MAX_KNOWN_INSTANCES, 512):
        policy.pick([Stub(f"h:{number}") for number in range(start, start + 512)], 1, SESSIONS[0])
    assert len(policy._digests) <= MAX_KNOWN_INSTANCES


@pytest.mark.parametrize(
    ("lines", "fields", "key"),
    [
        ([b"Accept: */*\r\n", b"X-Session-ID: abc \r\n"], {"user": "u"}, b"abc"),
        ([b"x-session-id:7\r\n"], {}, b"7"),
        ([b"X-Session-Id-Not: 7\r\n"], {"user": "grün"}, "grün".encode()),
        ([b"X-Session-ID: \r\n"], {}, b""),
        ([], {"user": 5}, b""),
        ([], {"user": "\ud800"}, b"\xed\xa0\x80"),
        ([], {}, b""),
    ],
)
def test_the_key_is_the_header_or_the_user(lines: list[bytes], fields: dict[str, object], key: bytes) -> None:
    assert session_key_of(lines, fields) == key
