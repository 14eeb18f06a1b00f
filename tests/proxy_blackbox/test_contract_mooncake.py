"""Contract `mooncake` over processes: engine ids asked of bootstrap ports, pairs that meet by transfer id."""

from __future__ import annotations

import pytest

from tests.proxy_blackbox.contracts import begun, called_off, leave
from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, HOST, Engines, Proxy, body_of, eventually, text_for

NUM_RANKS = 3
CONTRACT, ENGINE_FLAGS = "mooncake", ("--num-ranks", str(NUM_RANKS))


def served(proxy: Proxy, number: int = 0, path: str = CHAT, **more: object) -> None:
    fields = body_of(path, stream=bool(number % 2), **more)
    answer = proxy.post(path, fields)
    assert (answer.status, answer.text) == (200, text_for(fields)), answer.body[:300]


def kv_totals(proxy: Proxy) -> dict[str, int]:
    found: dict[str, int] = proxy.get("/instances").json["kv_ledger"]["totals"]
    return found


def test_the_legs_run_at_the_same_time(proxy: Proxy, engines: Engines) -> None:
    sock = begun(proxy, CHAT, body_of(CHAT, mock={"prefill_s": 10}))
    eventually(lambda: not engines.count("decode", "waits"), "the decoder was not told")
    assert engines.count("prefill", "prefills") == 1 and engines.count("decode", "decodes") == 0
    leave(sock)


def test_engine_ids_are_asked_once(proxy: Proxy, engines: Engines) -> None:
    for number in range(8):
        served(proxy, number)
    assert engines.count("prefill", "queries") <= 2
    told = [one["body"]["kv_transfer_params"] for one in engines.requests("decode")]
    assert {one["remote_bootstrap_addr"] for one in told} <= {f"http://{HOST}:{port}" for port in engines.prefill}
    assert len({one["transfer_id"] for one in told}) == 8


def test_ranks_are_used_alike(proxy: Proxy, engines: Engines) -> None:
    engines.stop(engines.prefill[1])
    for number in range(6):
        served(proxy, number)
    assert [engines.count("prefill", f"rank_{rank}") for rank in range(NUM_RANKS)] == [2, 2, 2]


def test_a_restarted_prefiller_has_a_new_engine_id_and_the_next_request_succeeds(
    proxy: Proxy, engines: Engines
) -> None:
    for number in range(4):
        served(proxy, number)
    for port in engines.prefill:
        engines.stop(port)
        engines.start(port)
    for number in range(4):
        served(proxy, number)
    served(proxy, 0, COMPLETIONS)
    assert engines.count("decode", "unknown_engine") == 0


def test_a_stale_engine_id_costs_a_retry_and_no_error(proxy: Proxy, engines: Engines) -> None:
    """A decoder that doesn't find the engine fails, and the next attempt asks again who is there."""
    engines.fault("decode", "status", status=500, shared=True)
    served(proxy)
    assert engines.count("prefill", "queries") >= 1


def test_kv_that_no_decoder_took_is_reclaimed(proxy: Proxy, engines: Engines) -> None:
    """Its prefill has ended when the decoder fails: another decoder takes the KV, for one token."""
    served(proxy)
    before = kv_totals(proxy)
    engines.fault("decode", "hang_before_head", shared=True)
    served(proxy)
    eventually(proxy.wrong, "the proxy is not idle")
    after = kv_totals(proxy)
    assert after["reclaimed"] - before["reclaimed"] == 1 and after["orphaned"] == before["orphaned"]


def test_a_client_that_leaves_while_the_decoder_waits_frees_both_sides(proxy: Proxy, engines: Engines) -> None:
    sock = begun(proxy, CHAT, body_of(CHAT, mock={"prefill_s": 10}))
    eventually(lambda: not engines.count("decode", "waits"), "the decoder was not told")
    leave(sock)
    called_off(proxy, engines, "decode", "prefill")


def test_one_leg_fails_and_the_other_is_called_off_at_once(proxy: Proxy, engines: Engines) -> None:
    engines.fault("decode", "status", status=400, shared=True)
    assert proxy.post(CHAT, body_of(CHAT, mock={"prefill_s": 10})).status == 400
    called_off(proxy, engines, "prefill")


@pytest.mark.parametrize("more", [{"n": 2}, {"prompt": ["a", "b"]}])
def test_several_are_not_handed_over_under_one_id(proxy: Proxy, engines: Engines, more: dict[str, object]) -> None:
    answer = proxy.post(COMPLETIONS, {**body_of(COMPLETIONS), **more})
    assert answer.status == 200
    for one in engines.requests("prefill"):
        assert one["body"].get("n") in (None, 1) and isinstance(one["body"]["prompt"], str)
