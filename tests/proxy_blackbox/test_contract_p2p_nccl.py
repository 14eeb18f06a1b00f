"""Contract `p2p-nccl` over processes: addresses in the request id, the prefill's end before the decode."""

from __future__ import annotations

import subprocess

import pytest

from tests.proxy_blackbox.harness import CHAT, PROXY, Engines, Proxy, body_of, eventually, text_for

CONTRACT = "p2p-nccl"


def test_the_id_names_both_and_the_decode_waits_for_the_prefill(proxy: Proxy, engines: Engines) -> None:
    fields = body_of(CHAT, stream=True, mock={"prefill_s": 0.1})
    answer = proxy.post(CHAT, fields, X_Request_Id="mine")
    assert answer.text == text_for(fields)
    assert answer.headers["x-request-id"] == "mine"
    prefill, decode = engines.requests("prefill")[0], engines.requests("decode")[0]
    assert prefill["headers"]["x-request-id"] == decode["headers"]["x-request-id"]
    assert (prefill["body"]["max_tokens"], decode["body"]["max_tokens"]) == (1, 5)


@pytest.mark.parametrize("own", ["mine", "m" * 250], ids=["short", "long"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_is_not_told_the_addresses(proxy: Proxy, stream: bool, own: str) -> None:
    """One engine would have made the answer's id of the client's own."""
    fields = body_of(CHAT, stream=stream, mock={"interval_s": 0.01} if stream else {})
    answer = proxy.post(CHAT, fields, X_Request_Id=own)
    told = [one for one in answer.events if one != "[DONE]"] if stream else [answer.json]
    assert answer.text == text_for(fields)
    assert {one["id"] for one in told} == {f"chatcmpl-{own}"} and b"_addr_" not in answer.body


def test_a_pair_is_tried_again_under_another_id(proxy: Proxy, engines: Engines) -> None:
    engines.fault("decode", "status", status=500, shared=True)
    fields = body_of(CHAT, stream=True)
    assert proxy.post(CHAT, fields).text == text_for(fields)
    ids = [one["headers"]["x-request-id"] for one in engines.requests("decode")]
    assert len(set(ids)) == 2 and engines.count("prefill", "prefills") == 2


def test_kv_that_no_decoder_came_for_is_counted(proxy: Proxy, engines: Engines) -> None:
    """The decoder has it and can't be told: there is no way to give it back."""

    def totals() -> dict[str, int]:
        found: dict[str, int] = proxy.get("/instances").json["kv_ledger"]["totals"]
        return found

    before = totals()
    assert proxy.post(CHAT, body_of(CHAT)).status == 200
    assert totals() == {**before, "held": before["held"] + 1, "consumed": before["consumed"] + 1}
    before = totals()
    engines.fault("decode", "status", status=403, shared=True)
    assert proxy.post(CHAT, body_of(CHAT)).status == 403
    eventually(proxy.wrong, "the proxy is not idle")
    assert totals() == {**before, "held": before["held"] + 1, "orphaned": before["orphaned"] + 1}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--prefiller-kv-ports", "1", "2"), "--prefiller-kv-ports has 2 ports for 1 instances"),
        (("--min-remote-prefill-tokens", "5"), "--min-remote-prefill-tokens"),
        (("--contract", "p2p"), "did you mean p2p-nccl?"),
        (("--advertise-url", "proxy:8000"), "--advertise-url proxy:8000"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(flags: tuple[str, ...], named: str) -> None:
    ended = subprocess.run([PROXY, "--contract", "p2p-nccl", *flags], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and named in ended.stderr and ended.stderr.count("\n") == 1
