"""Instances that are added, removed, drained and given another role while requests run."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.proxy_blackbox.admin import at, becomes, change, in_background, shown, state, under_load
from tests.proxy_blackbox.harness import (
    CHAT,
    HOST,
    Engines,
    Proxy,
    body_of,
    connected,
    eventually,
    free_port,
    raw_post,
    text_for,
)

StartProxy = Callable[..., Proxy]
REPLY_KEYS = {"message", "current_prefill_instances", "current_decode_instances"}


def test_the_replies_have_the_seeds_keys_and_what_they_hold(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy()
    for one, other in (engines.prefill, engines.decode):
        role = "prefill" if one in engines.prefill else "decode"
        removed = change(proxy, "remove", type=role, instances=at(one)).json
        assert set(removed) == REPLY_KEYS and at(one) in removed["message"]
        assert removed[f"current_{role}_instances"] == [at(other)]
        assert change(proxy, "add", type=role, instances=[at(one)]).json.keys() == REPLY_KEYS
        becomes(proxy, role, one, "active")
    assert proxy.get("/healthcheck").json["prefill_instances"] == 2


def test_nothing_is_lost_while_instances_come_and_go_under_load(start_proxy: StartProxy, engines: Engines) -> None:
    """The example proxy finishes a removal only once the whole proxy is idle (ascend-proxy.md 2.1, "Health and
    membership"): here each instance is gone when its own work is done, under load that never pauses."""
    proxy = start_proxy("--waiting-retry-interval", "0.1")
    with under_load(proxy, mock={"interval_s": 0.005, "prefill_s": 0.005}):
        for role, port in (("decode", engines.decode[0]), ("prefill", engines.prefill[1])):
            change(proxy, "remove", type=role, instances=at(port))
            becomes(proxy, role, port, None)
            change(proxy, "add", type=role, instances=at(port))
            becomes(proxy, role, port, "active")


def test_the_capacity_of_one_that_is_added_is_known_at_once(start_proxy: StartProxy, engines: Engines) -> None:
    """Not after the next round of reading: until then it would count as having room always."""
    proxy = start_proxy("--capacity-interval-s", "3600", "--waiting-retry-interval", "0.1")
    added = engines.decode[1]
    change(proxy, "remove", type="decode", instances=at(added))
    becomes(proxy, "decode", added, None)
    info = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"}'
    engines.configure(gauges={info: 1, "vllm:num_requests_waiting": 7})
    change(proxy, "add", type="decode", instances=at(added))
    becomes(proxy, "decode", added, "active")
    eventually(lambda: shown(proxy, "decode", added)["load"]["max_kv_tokens"] != 1600, "its capacity is not known")
    assert shown(proxy, "decode", added)["queue"] == {"num_open": 0, "num_waiting": 7}
    assert shown(proxy, "decode", engines.decode[0])["queue"]["num_waiting"] is None


def test_one_that_is_leaving_can_be_added_again(start_proxy: StartProxy, engines: Engines) -> None:
    """The example proxy ignores the add of a tainted node (2.1: "Tainted nodes cannot be re-added")."""
    proxy = start_proxy()
    first, second = engines.decode
    change(proxy, "remove", type="decode", instances=at(second))
    fields = body_of(CHAT, num_tokens=40, stream=True, mock={"interval_s": 0.03})
    with in_background(proxy, fields) as answers:
        eventually(lambda: shown(proxy, "decode", first)["load"]["num_requests"] != 1, "not in flight")  # type: ignore[index]
        change(proxy, "remove", type="decode", instances=at(first))
        leaving = shown(proxy, "decode", first)
        assert leaving is not None and leaving["state"] == "draining" and not leaving["enabled"]
        assert leaving["drain_ends_in_s"] > 500
        change(proxy, "add", type="decode", instances=at(first))
        assert state(proxy, "decode", first) == "active"
    assert answers[0].text == text_for(fields)
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


def test_one_that_is_leaving_gets_no_new_work_even_if_it_is_the_last(start_proxy: StartProxy, engines: Engines) -> None:
    """The example proxy picks a tainted node where there is no other (2.1, Scores: priority 1e15)."""
    proxy = start_proxy()
    change(proxy, "remove", type="decode", instances=at(engines.decode[1]))
    fields = body_of(CHAT, num_tokens=30, stream=True, mock={"interval_s": 0.03})
    with in_background(proxy, fields) as answers:
        eventually(lambda: engines.count("decode", "decodes") != 1, "not decoding")
        change(proxy, "remove", type="decode", instances=at(engines.decode[0]))
        refused = proxy.post(CHAT, body_of(CHAT))
        assert refused.status == 503 and refused.headers["retry-after"] and "decode" in refused.error["message"]
    assert answers[0].text == text_for(fields), "what it had is ended well"
    becomes(proxy, "decode", engines.decode[0], None)


def test_a_prefiller_serves_its_kv_before_it_goes(start_proxy: StartProxy, engines: Engines) -> None:
    """Draining is not done: a prefiller without work still has to serve reads (users-ask.md, 12)."""
    proxy = start_proxy()
    gone, kept = engines.prefill
    change(proxy, "remove", type="prefill", instances=at(kept))
    with in_background(proxy, body_of(CHAT, mock={"first_token_s": 1.5})) as answers:
        eventually(lambda: engines.count("decode", "decodes") != 1, "not handed over")
        change(proxy, "remove", type="prefill", instances=at(gone))
        leaving = shown(proxy, "prefill", gone)
        assert leaving is not None
        assert (leaving["state"], leaving["kv_held"], leaving["load"]["num_requests"]) == ("serving_kv", 1, 0)
    assert answers[0].status == 200
    becomes(proxy, "prefill", gone, None)


def test_a_drain_has_a_deadline(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy()
    port = engines.decode[0]
    change(proxy, "remove", type="decode", instances=at(engines.decode[1]))
    with connected(proxy.port) as sock:
        fields = body_of(CHAT, num_tokens=90_000, stream=True, mock={"interval_s": 0.05})
        sock.sendall(raw_post(CHAT, _encoded(fields)))
        assert sock.recv(1000)
        change(proxy, "remove", type="decode", instances=at(port), drain_timeout_s=2)
        assert state(proxy, "decode", port) == "draining"
        becomes(proxy, "decode", port, None)
    eventually(lambda: "drained=False" not in proxy.process.output, "not logged")


def test_a_removal_can_be_waited_for(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy()
    change(proxy, "remove", type="decode", instances=at(engines.decode[1]))
    with in_background(proxy, body_of(CHAT, num_tokens=20, stream=True, mock={"interval_s": 0.03})):
        eventually(lambda: engines.count("decode", "decodes") != 1, "not decoding")
        answer = change(proxy, "remove", type="decode", instances=at(engines.decode[0]), wait_s=10)
        assert answer.json["current_decode_instances"] == []


def test_a_client_that_leaves_during_prefill_does_not_hold_up_a_drain(
    start_proxy: StartProxy, engines: Engines
) -> None:
    """Warning sign in ascend-proxy.md 2.1: the example proxy's `except Exception` does not see CancelledError, so a
    client that disconnects during prefill leaves its load and its request count for ever, and draining never ends."""
    proxy = start_proxy()
    with connected(proxy.port) as sock:
        sock.sendall(raw_post(CHAT, _encoded(body_of(CHAT, mock={"prefill_s": 0.5}))))
        eventually(lambda: engines.count("prefill", "prefills") != 1, "no prefill began")
    eventually(proxy.wrong, "its load is still there")
    for role, ports in (("prefill", engines.prefill), ("decode", engines.decode)):
        change(proxy, "remove", type=role, instances=[at(port) for port in ports])
        for port in ports:
            becomes(proxy, role, port, None)


def test_removing_what_waits_or_nobody_knows_does_no_harm(start_proxy: StartProxy, engines: Engines) -> None:
    """Warning sign in ascend-proxy.md 2.1: removing a still-waiting or unknown address under load taints a key without
    a server entry; when it becomes ready, a KeyError ends the listener thread, and no node is ever added or removed
    again."""
    proxy = start_proxy("--waiting-retry-interval", "0.1", "--max-waiting-retries", "200")
    late, other = engines.decode
    change(proxy, "remove", type="decode", instances=at(late))
    becomes(proxy, "decode", late, None)
    engines.stop(late)
    with under_load(proxy, mock={"interval_s": 0.005}):
        assert change(proxy, "remove", type="decode", instances=f"{HOST}:{free_port()}").status == 200
        change(proxy, "add", type="decode", instances=at(late))
        (waiting,) = proxy.get("/instances").json["waiting"]
        assert (waiting["role"], waiting["address"], waiting["state"]) == ("decode", at(late), "waiting")
        change(proxy, "remove", type="decode", instances=at(late))
        assert proxy.get("/instances").json["waiting"] == []
        engines.start(late)
        change(proxy, "add", type="decode", instances=at(late))
        becomes(proxy, "decode", late, "active")
        change(proxy, "remove", type="decode", instances=at(other))
        becomes(proxy, "decode", other, None)


def test_one_that_is_added_joins_when_it_answers_and_is_given_up_otherwise(
    start_proxy: StartProxy, engines: Engines
) -> None:
    proxy = start_proxy("--waiting-retry-interval", "0.3", "--max-waiting-retries", "3")
    port = engines.decode[0]
    change(proxy, "remove", type="decode", instances=at(port))
    engines.stop(port)
    change(proxy, "add", type="decode", instances=at(port))
    eventually(lambda: not _waiting(proxy) or not _waiting(proxy)[0]["last_error"], "was not probed")
    engines.start(port)
    becomes(proxy, "decode", port, "active")
    change(proxy, "remove", type="decode", instances=at(port))
    engines.stop(port)
    change(proxy, "add", type="decode", instances=at(port))
    eventually(lambda: _waiting(proxy), "still waits")
    assert state(proxy, "decode", port) is None
    assert "event=instance_dropped" in proxy.process.output


def test_one_that_hangs_is_given_up_too(start_proxy: StartProxy) -> None:
    proxy = start_proxy("--waiting-retry-interval", "0.1", "--max-waiting-retries", "2", "--health-timeout-s", "0.2")
    with socket.create_server((HOST, 0)) as silent:
        change(proxy, "add", type="decode", instances=at(silent.getsockname()[1]))
        eventually(lambda: "no answer in time" not in proxy.process.output, "still asked")
        eventually(lambda: _waiting(proxy), "still waits")


def test_localhost_means_the_same_instance(start_proxy: StartProxy, engines: Engines) -> None:
    """One backend by three names, as the example proxy has it (2.1, "Server key")."""
    proxy = start_proxy()
    port = engines.decode[0]
    change(proxy, "add", type="decode", instances=[f"localhost:{port}", f"0.0.0.0:{port}"])
    assert len(proxy.get("/instances").json["instances"]) == 4 and not _waiting(proxy)
    change(proxy, "remove", type="decode", instances=f"localhost:{port}")
    becomes(proxy, "decode", port, None)


def test_ipv6_is_accepted_in_brackets(start_proxy: StartProxy) -> None:
    """Address parsing of the example proxy splits at ":" (2.1): IPv6 is impossible there."""
    proxy = start_proxy("--waiting-retry-interval", "60")
    answer = change(proxy, "add", type="prefill", instances="[0:0:0:0:0:0:0:1]:9")
    assert answer.status == 200 and "[0:0:0:0:0:0:0:1]:9" in answer.json["message"]
    assert len(_waiting(proxy)) == 1
    change(proxy, "remove", type="prefill", instances="[::1]:9")
    assert not _waiting(proxy)


def test_ipv6_instances_are_added_serve_and_are_removed(start_proxy: StartProxy, engines: Engines) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    six = Engines(0, 0, "--prefill-at", "[::1]:0", "--decode-at", "[::1]:0")
    try:
        proxy = start_proxy("--waiting-retry-interval", "0.1")
        added = {"prefill": f"[::1]:{six.prefill[0]}", "decode": f"[::1]:{six.decode[0]}"}
        for role, address in added.items():
            assert address in change(proxy, "add", type=role, instances=address).json["message"]
        eventually(lambda: len(proxy.get("/instances").json["instances"]) < 6, "they did not join")
        for role in added:
            for port in getattr(engines, role):
                change(proxy, "remove", type=role, instances=at(port))
        eventually(lambda: len(proxy.get("/instances").json["instances"]) > 2, "the others did not go")
        fields = body_of(CHAT, stream=True)
        assert proxy.post(CHAT, fields).text == text_for(fields)
        assert six.count("prefill", "prefills") == six.count("decode", "decodes") == 1
        eventually(six.wrong, "KV was left")
        for role, address in added.items():
            reply = change(proxy, "remove", type=role, instances=[address]).json
            assert address not in reply[f"current_{role}_instances"]
    finally:
        six.process.stop()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"type": "both", "instances": "a:1"}, "'prefill' or 'decode'"),
        ({"type": "prefill", "instances": "http://10.0.0.1:8000"}, "did you mean 10.0.0.1:8000?"),
        ({"type": "prefill", "instances": "fe80::1:8000"}, "did you mean [fe80::1]:8000?"),
        ({"type": "prefill", "instances": "junk"}, "'junk' is not host:port"),
        ({"type": "prefill", "instances": ["a:1", "b:x"]}, "'b:x' is not host:port"),
        ({"type": "prefill", "instances": "a:0"}, "'a:0'"),
        ({"type": "prefill", "instances": []}, "a list of them"),
        ({"type": "prefill", "instances": [["a", 1]]}, "a list of them"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(proxy: Proxy, fields: dict[str, Any], says: str) -> None:
    """The example proxy answers an unknown type with 200, and junk with 500 (2.1, Endpoints)."""
    for what in ("add", "remove", "role"):
        answer = change(proxy, what, **fields)
        assert answer.status == 400 and says in answer.error["message"]
    assert len(proxy.get("/instances").json["instances"]) == 4 and not _waiting(proxy)


def test_an_instance_changes_its_role(start_proxy: StartProxy, engines: Engines) -> None:
    proxy = start_proxy()
    port = engines.decode[1]
    change(proxy, "remove", type="decode", instances=at(engines.decode[0]))
    with in_background(proxy, body_of(CHAT, num_tokens=30, stream=True, mock={"interval_s": 0.03})):
        eventually(lambda: engines.count("decode", "decodes") != 1, "not decoding")
        assert change(proxy, "role", type="prefill", instances=at(port)).json.keys() == REPLY_KEYS
        leaving = shown(proxy, "decode", port)
        assert leaving is not None and (leaving["state"], leaving["becoming"]) == ("draining", "prefill")
        assert state(proxy, "prefill", port) is None, "it has its work in the old role to end first"
    becomes(proxy, "prefill", port, "active")
    assert state(proxy, "decode", port) is None
    change(proxy, "role", type="decode", instances=at(port))
    becomes(proxy, "decode", port, "active")
    assert state(proxy, "prefill", port) is None
    assert change(proxy, "role", type="decode", instances=at(port)).status == 200, "it is that already"
    assert change(proxy, "role", type="decode", instances=f"{HOST}:{free_port()}").status == 404
    assert proxy.post(CHAT, body_of(CHAT)).status == 200


def test_instances_show_state_health_and_errors(start_proxy: StartProxy, engines: Engines) -> None:
    """Live backends of the example proxy are never probed (2.1, "Health and membership")."""
    proxy = start_proxy("--health-interval-s", "0.1", "--health-retry-interval-s", "0.1")
    port = engines.decode[0]
    engines.stop(port)
    eventually(lambda: shown(proxy, "decode", port)["healthy"], "still healthy")  # type: ignore[index]
    seen = shown(proxy, "decode", port)
    assert seen is not None and seen["enabled"] and seen["last_error"] and seen["num_failures"] >= 2
    assert (seen["state"], seen["source"], seen["name"]) == ("active", "config", at(port))
    assert seen["load"]["speed_tokens_per_s"] > 0
    engines.start(port)
    eventually(lambda: not shown(proxy, "decode", port)["healthy"], "still out")  # type: ignore[index]


def _encoded(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def _waiting(proxy: Proxy) -> Any:
    return proxy.get("/instances").json["waiting"]
