"""Host names that stand for one instance, for several, and for others after a while. Real engines on loopback
addresses; only the resolver is the test's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from proxy.app import ProxyApp
from proxy.config import Address, ProxyConfig
from proxy.discovery.dns import is_name, look_up
from proxy.drain import wait_until
from proxy.upstream import UpstreamConnection
from tests.unit.proxy.client import COMPLETIONS, Client, ask, fields_of, request_bytes
from tests.unit.proxy.stand_in import Engine

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
NAME = "decoders.test"


class Names:
    """A resolver that says what it was told."""

    def __init__(self) -> None:
        self.answers: dict[str, frozenset[str]] = {}
        self.num_asked = 0
        self.hangs = False

    async def resolve(self, host: str) -> frozenset[str]:
        self.num_asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if host not in self.answers:
            raise OSError("no such name")
        return self.answers[host]


class Scene:
    """A proxy whose decoder is a name, and a decoder on each of three addresses, all on one port."""

    def __init__(self, app: ProxyApp, names: Names, prefiller: Engine, decoders: list[Engine]) -> None:
        self.app = app
        self.names = names
        self.prefiller = prefiller
        self.decoders = decoders
        self.port = app.addresses[0].port

    def say(self, *hosts: str) -> None:
        self.names.answers[NAME] = frozenset(hosts)

    def members(self) -> list[str]:
        return sorted(one.address.host for one in self.app.fleet.all if one.role == "decode" and one.enabled)

    async def becomes(self, *hosts: str) -> None:
        await wait_until(lambda: self.members() == sorted(hosts) and len(self.app.fleet.all) == len(hosts) + 1, 5)
        assert self.members() == sorted(hosts)
        assert len(self.app.fleet.all) == len(hosts) + 1

    async def asked_again(self) -> None:
        before = self.names.num_asked
        assert await wait_until(lambda: self.names.num_asked > before + 1, 5)

    async def served_by(self) -> set[str]:
        for one in self.decoders:
            one.requests.clear()
        for _ in range(6):
            assert (await ask(self.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200
        return {one.host for one in self.decoders if one.requests}


Begin = Callable[..., Awaitable[Scene]]


@pytest.fixture
async def begin() -> AsyncIterator[Begin]:
    scenes: list[Scene] = []

    async def make(*hosts: str, **config: Any) -> Scene:
        prefiller = Engine("prefill")
        await prefiller.start()
        decoders = [Engine("decode", host=host) for host in HOSTS]
        for one in decoders:
            one.port = decoders[0].port
            await one.start()
        names = Names()
        if hosts:
            names.answers[NAME] = frozenset(hosts)
        values = {
            "host": "127.0.0.1", "port": 0, "prefiller_hosts": ("127.0.0.1",), "prefiller_ports": (prefiller.port,),
            "decoder_hosts": (NAME,), "decoder_ports": (decoders[0].port,), "dns_refresh_interval": 0.05, **config,
        }  # fmt: skip
        app = ProxyApp(ProxyConfig(**values), asyncio.get_running_loop(), names.resolve)
        await app.start()
        scenes.append(Scene(app, names, prefiller, decoders))
        return scenes[-1]

    yield make
    for scene in scenes:
        await scene.app.drain()
        await scene.app.stop()
        for engine in [scene.prefiller, *scene.decoders]:
            await engine.stop()


async def test_several_addresses_are_several_instances(begin: Begin) -> None:
    scene = await begin("127.0.0.1", "127.0.0.2")
    await scene.becomes("127.0.0.1", "127.0.0.2")
    assert await scene.served_by() == {"127.0.0.1", "127.0.0.2"}
    assert scene.decoders[0].requests[0].headers["host"] == f"{NAME}:{scene.decoders[0].port}"


async def test_they_come_and_go_with_the_records(begin: Begin) -> None:
    scene = await begin("127.0.0.1", "127.0.0.2")
    await scene.becomes("127.0.0.1", "127.0.0.2")
    scene.say("127.0.0.2", "127.0.0.3")
    await scene.becomes("127.0.0.2", "127.0.0.3")
    assert await scene.served_by() == {"127.0.0.2", "127.0.0.3"}
    scene.say("127.0.0.3")
    await scene.becomes("127.0.0.3")


async def test_one_that_goes_is_drained(begin: Begin) -> None:
    scene = await begin("127.0.0.1", "127.0.0.2")
    await scene.becomes("127.0.0.1", "127.0.0.2")
    for one in scene.decoders:
        one.gate = asyncio.Event()
    clients = [await Client.connect(scene.port) for _ in range(2)]
    for one in clients:
        one.writer.write(request_bytes(COMPLETIONS, fields_of(COMPLETIONS, stream=True)))
        assert (await one.head())[0] == 200
    scene.say("127.0.0.2")
    assert await wait_until(lambda: scene.members() == ["127.0.0.2"], 5)
    assert len(scene.app.fleet.all) == 3, "it still has a stream"
    for decoder in scene.decoders:
        assert decoder.gate is not None
        decoder.gate.set()
    await scene.becomes("127.0.0.2")
    for one in clients:
        one.close()


async def test_a_failure_keeps_the_last_answer(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    scene = await begin("127.0.0.1", "127.0.0.2")
    await scene.becomes("127.0.0.1", "127.0.0.2")
    del scene.names.answers[NAME]
    with caplog.at_level(logging.WARNING):
        await scene.asked_again()
    assert caplog.text.count("event=dns_failed host=decoders.test reason='no such name'") == 1, "said once"
    scene.names.answers[NAME] = frozenset()
    await scene.asked_again()
    await scene.becomes("127.0.0.1", "127.0.0.2")


async def test_a_name_that_is_not_known_yet_is_waited_for(begin: Begin) -> None:
    scene = await begin()
    await scene.asked_again()
    assert scene.members() == [NAME]
    assert (await ask(scene.port, COMPLETIONS, fields_of(COMPLETIONS))).status in (502, 503)
    scene.say("127.0.0.1", "127.0.0.3")
    await scene.becomes("127.0.0.1", "127.0.0.3")
    assert (await ask(scene.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200


async def test_one_address_stays_under_its_name_and_a_new_one_is_connected_to(begin: Begin) -> None:
    scene = await begin("127.0.0.1", decoder_hosts=("localhost",))
    scene.names.answers["localhost"] = frozenset({"127.0.0.1"})
    assert (await ask(scene.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200
    assert scene.names.num_asked == 0, "this host is no name to look up"
    scene = await begin("127.0.0.1")
    await scene.asked_again()
    await scene.becomes(NAME)
    decoder = next(one for one in scene.app.fleet.all if one.role == "decode")
    idle = await asyncio.get_running_loop().create_connection(
        lambda: UpstreamConnection(decoder.pool), "127.0.0.1", scene.decoders[0].port
    )
    decoder.pool.put_back(idle[1])
    scene.say("127.0.0.2")
    assert await wait_until(lambda: not decoder.pool.idle and idle[0].is_closing(), 5)
    assert scene.members() == [NAME] and not decoder.pool.closed


async def test_one_that_an_operator_took_out_stays_out(begin: Begin) -> None:
    scene = await begin(*HOSTS)
    await scene.becomes(*HOSTS)
    port = scene.decoders[0].port
    await ask(scene.port, "/instances/remove", {"type": "decode", "instances": f"127.0.0.1:{port}"})
    await scene.asked_again()
    await scene.becomes("127.0.0.2", "127.0.0.3")
    scene.say("127.0.0.1", "127.0.0.3")
    await scene.becomes("127.0.0.3")
    await ask(scene.port, "/instances/remove", {"type": "decode", "instances": f"{NAME}:{port}"})
    await scene.becomes()
    await wait_until(lambda: False, 0.2)
    before = scene.names.num_asked
    await wait_until(lambda: False, 0.2)
    assert scene.names.num_asked == before, "the name is not looked up any more"


async def test_an_operator_adds_by_name(begin: Begin) -> None:
    scene = await begin("127.0.0.1", "127.0.0.2", decoder_hosts=("127.0.0.3",))
    address = f"{NAME}:{scene.decoders[0].port}"
    await ask(scene.port, "/instances/add", {"type": "decode", "instances": address})
    await scene.becomes(*HOSTS)


async def test_a_look_up_that_hangs_does_no_harm(begin: Begin) -> None:
    scene = await begin("127.0.0.1", "127.0.0.2")
    await scene.becomes("127.0.0.1", "127.0.0.2")
    scene.names.hangs = True
    await wait_until(lambda: False, 0.2)
    assert (await ask(scene.port, COMPLETIONS, fields_of(COMPLETIONS))).status == 200


def test_what_is_a_name() -> None:
    assert is_name(Address("decoder-0.svc", 1))
    assert not any(is_name(Address(host, 1)) for host in ("localhost", "10.0.0.1", "::1", "0.0.0.0"))


async def test_the_systems_resolver_prefers_ipv4() -> None:
    assert await look_up("localhost") == {"127.0.0.1"}
    with pytest.raises(OSError, match=r".+"):
        await look_up("no-such-host.invalid")
