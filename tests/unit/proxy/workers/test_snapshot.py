from __future__ import annotations

import asyncio
import math
from time import monotonic

import orjson

from proxy.app import ProxyApp
from proxy.config import Address, ProxyConfig
from proxy.instance import Role, Source
from proxy.workers.snapshot import restore, taken

CONFIG = ProxyConfig(prefiller_ports=(1001,), decoder_ports=(2001, 2002), decoder_hosts=("127.0.0.1", "127.0.0.1"))


def app(config: ProxyConfig = CONFIG) -> ProxyApp:
    """Not started: nothing connects."""
    return ProxyApp(config, asyncio.get_running_loop())


def members(one: ProxyApp) -> set[tuple[str, str, str]]:
    return {(each.role.value, each.key, each.source.value) for each in one.fleet.all}


async def test_a_successor_knows_what_became_of_the_members() -> None:
    old, new = app(), app()
    decode = Role.DECODE
    for port, source in ((3001, Source.ADMIN), (3002, Source.LEASE), (3003, Source.KUBERNETES)):
        old.membership.add(decode, Address("127.0.0.1", port), source, at_once=True)
    old.membership.register(decode, Address("127.0.0.1", 3002), 60, monotonic())
    old.membership.register(decode, Address("127.0.0.1", 3004), 30, monotonic())
    old.membership.remove(decode, Address("127.0.0.1", 2001))
    old.membership.remove(decode, Address("127.0.0.1", 3003))
    old.membership.add(Role.PREFILL, Address("::1", 9), Source.ADMIN)
    read = ProxyConfig(prefiller_ports=(1001,), decoder_ports=(2002,), max_retries=9)

    sent = orjson.loads(orjson.dumps(taken(read, old.fleet, old.membership)))
    known = restore(sent, CONFIG, new.fleet, new.membership)

    assert known.decoders == read.decoders and known.max_retries == CONFIG.max_retries
    assert members(new) == {
        ("prefill", "localhost:1001", "config"),
        ("decode", "127.0.0.1:2002", "config"),
        ("decode", "127.0.0.1:3001", "admin"),
        ("decode", "127.0.0.1:3002", "lease"),
    }
    assert new.membership.leases == old.membership.leases and len(new.membership.leases) == 2
    assert new.membership.waiting.keys() == old.membership.waiting.keys()
    assert new.membership.memory() == old.membership.memory() == [[["decode", "127.0.0.1", 3003, None]], [], []]
    new.membership.add(decode, Address("127.0.0.1", 3003), Source.KUBERNETES)
    assert new.fleet.find(decode, Address("127.0.0.1", 3003)) is None, "an operator took it out"
    for one in (old, new):
        one.membership.stop()
    await asyncio.sleep(0)


async def test_a_name_that_stands_for_several_is_handed_over_once_as_a_name() -> None:
    old, new = app(), app()
    name = Address("engines.example", 8000)
    for host in ("10.0.0.1", "10.0.0.2"):
        old.membership.add(Role.DECODE, Address(host, 8000), Source.ADMIN, name=name, at_once=True)
    restore(taken(CONFIG, old.fleet, old.membership), CONFIG, new.fleet, new.membership)
    assert [one.address for one in new.fleet.members[Role.DECODE] if one.source is Source.ADMIN] == [name]


async def test_one_that_is_given_another_role_comes_in_its_new_one() -> None:
    old, new = app(), app()
    address = Address("127.0.0.1", 2001)
    load = old.fleet.find(Role.DECODE, address)
    assert load is not None
    open_work = load.load.reserve(1)
    old.membership.change_role(Role.PREFILL, address)
    restore(taken(CONFIG, old.fleet, old.membership), CONFIG, new.fleet, new.membership)
    assert new.fleet.find(Role.DECODE, address) is None
    assert list(new.membership.waiting) == [(Role.PREFILL, address)]
    open_work.release()
    assert load.drain_by < math.inf
    for one in (old, new):
        one.membership.stop()
    await asyncio.sleep(0)
