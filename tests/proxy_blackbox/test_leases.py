"""Instances that register themselves, and are members for as long as they renew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.proxy_blackbox.admin import at, becomes, change, shown, state
from tests.proxy_blackbox.harness import CHAT, HOST, Answer, Engines, Proxy, body_of, eventually, request


@pytest.fixture
def proxy(start_proxy: Callable[..., Proxy], engines: Engines) -> Iterator[Proxy]:
    """A proxy without the second decoder, which registers itself."""
    started = start_proxy()
    change(started, "remove", type="decode", instances=at(engines.decode[1]))
    becomes(started, "decode", engines.decode[1], None)
    yield started


def register(proxy: Proxy, port: int, ttl_s: float = 30.0, role: str = "decode") -> Answer:
    return change(proxy, "register", type=role, instance=at(port), ttl_s=ttl_s)


def test_one_that_renews_stays_and_one_that_stops_is_drained(proxy: Proxy, engines: Engines) -> None:
    port = engines.decode[1]
    told = register(proxy, port).json
    assert (told["type"], told["instance"], told["ttl_s"]) == ("decode", at(port), 30.0)
    becomes(proxy, "decode", port, "active")
    assert register(proxy, port, 1.5).json["joined"] is True
    seen = shown(proxy, "decode", port)
    assert seen is not None and seen["source"] == "lease" and 0 < seen["lease_ends_in_s"] <= 1.5
    for number in range(4):
        assert proxy.post(CHAT, body_of(CHAT, f"{number}")).status == 200
    becomes(proxy, "decode", port, None)
    assert "event=lease_expired" in proxy.process.output
    register(proxy, port)
    becomes(proxy, "decode", port, "active")


def test_one_that_registers_before_it_serves_joins_when_it_does(proxy: Proxy, engines: Engines) -> None:
    port = engines.decode[1]
    engines.stop(port)
    assert register(proxy, port).json["joined"] is False
    eventually(lambda: not proxy.get("/instances").json["waiting"][0]["last_error"], "was not probed")
    engines.start(port)
    becomes(proxy, "decode", port, "active")


@pytest.mark.parametrize("way", [("POST", "/instances/deregister"), ("DELETE", "/instances/register")])
def test_it_leaves_of_its_own_will(proxy: Proxy, engines: Engines, way: tuple[str, str]) -> None:
    port = engines.decode[1]
    register(proxy, port)
    becomes(proxy, "decode", port, "active")
    for was_registered in (True, False):
        answer = request(proxy.port, *way, {"type": "decode", "instance": at(port)})
        assert answer.status == 200 and answer.json["was_registered"] is was_registered
    becomes(proxy, "decode", port, None)


def test_what_an_operator_named_does_not_go_with_a_lease(proxy: Proxy, engines: Engines) -> None:
    port = engines.decode[0]
    register(proxy, port, 0.2)
    eventually(lambda: "event=lease_expired" not in proxy.process.output, "the lease does not end")
    assert state(proxy, "decode", port) == "active"


def test_what_an_operator_removed_is_not_brought_back_by_a_renewal(proxy: Proxy, engines: Engines) -> None:
    port = engines.decode[1]
    register(proxy, port)
    becomes(proxy, "decode", port, "active")
    change(proxy, "remove", type="decode", instances=at(port))
    refused = register(proxy, port, 0.3)
    assert refused.status == 409 and "/instances/add" in refused.error["message"]
    becomes(proxy, "decode", port, None)
    change(proxy, "add", type="decode", instances=at(port))
    becomes(proxy, "decode", port, "active")
    assert register(proxy, port).status == 200
    change(proxy, "remove", type="decode", instances=at(port))
    assert state(proxy, "decode", port) is None


def test_a_refusal_is_forgotten_once_it_has_been_silent_for_a_lease(proxy: Proxy, engines: Engines) -> None:
    port = engines.decode[1]
    register(proxy, port, 0.5)
    change(proxy, "remove", type="decode", instances=at(port))
    assert register(proxy, port, 0.5).status == 409
    eventually(lambda: register(proxy, port, 1e-6).status != 200, "still refused")


def test_a_renewal_in_the_old_role_keeps_the_new_one(proxy: Proxy, engines: Engines) -> None:
    port = engines.decode[1]
    register(proxy, port)
    becomes(proxy, "decode", port, "active")
    change(proxy, "role", type="prefill", instances=at(port))
    becomes(proxy, "prefill", port, "active")
    assert register(proxy, port).json["type"] == "prefill"
    assert state(proxy, "decode", port) is None
    register(proxy, port, 0.2)
    becomes(proxy, "prefill", port, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": -1}, "ttl_s"),
        ({"ttl_s": "10"}, "ttl_s"),
        ({"ttl_s": True}, "ttl_s"),
        ({"ttl_s": 1e9}, "ttl_s"),
        ({"ttl_s": None}, "ttl_s"),
        ({"instance": [f"{HOST}:1", f"{HOST}:2"]}, "instance"),
        ({"instance": 5}, "instance"),
        ({"instance": "x"}, "instances"),
        ({"type": "proxy"}, "type"),
    ],
)
def test_a_wrong_registration_is_400(start_proxy: Any, proxy: Proxy, fields: dict[str, Any], param: str) -> None:
    answer = change(proxy, "register", **{"type": "decode", "instance": f"{HOST}:1", "ttl_s": 5, **fields})
    assert (answer.status, answer.error["param"]) == (400, param)
