"""Contracts `mooncake`, `sglang`, `p2p-nccl`: what the two legs are told."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
import pytest

from proxy.contracts.mooncake import MooncakeContract
from proxy.contracts.p2p_nccl import P2pNcclContract
from proxy.contracts.pair import Endpoint, EngineRank
from proxy.contracts.sglang import SglangContract
from proxy.openai_api import ApiCall, parse_call

P, D = Endpoint("10.0.0.1", 8998), Endpoint("10.0.0.2", 14579)
RANK = EngineRank(3, "engine-3")
NUMBER = (1 << 128) - 12345


def call(route: str = "chat", **fields: Any) -> ApiCall:
    asked = {"messages": []} if route == "chat" else {"prompt": "x"}
    return parse_call(route, orjson.dumps({**asked, **fields}))


def test_mooncake_legs_meet_under_one_transfer_id() -> None:
    one = call(max_tokens=64, stream=True, stream_options={"include_usage": True}, unknown={"kept": [1]})
    told = MooncakeContract().meet(one, P, D, RANK, NUMBER)
    prefill, decode = orjson.loads(told.prefill_body), orjson.loads(told.decode_body)
    transfer_id = prefill["kv_transfer_params"]["transfer_id"]
    assert str(uuid.UUID(transfer_id)) == transfer_id
    assert prefill == {
        "messages": [], "max_tokens": 1, "min_tokens": 1, "max_completion_tokens": 1, "stream": False,
        "unknown": {"kept": [1]},
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id},
    }  # fmt: skip
    assert decode == {
        **one.fields,
        "kv_transfer_params": {
            "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": transfer_id,
            "remote_engine_id": "engine-3", "remote_bootstrap_addr": "http://10.0.0.1:8998",
        },
    }  # fmt: skip
    assert told.prefill_lines == b"X-data-parallel-rank: 3\r\n" and told.request_id == ""


def test_mooncake_left_kv_is_taken_for_one_token() -> None:
    contract, one = MooncakeContract(), call(max_tokens=64, stream=True)
    kv = contract.meet(one, P, D, RANK, NUMBER).kv
    assert kv is not None and contract.may_reclaim(kv, True)
    made = orjson.loads(contract.reclaim_body(one, kv))
    assert (made["kv_transfer_params"], made["max_tokens"], made["stream"]) == (kv, 1, False)


def test_an_ipv6_prefiller_is_bracketed() -> None:
    six = Endpoint("fd00::1", 8998)
    told = MooncakeContract().meet(call(), six, D, RANK, NUMBER)
    params = orjson.loads(told.decode_body)["kv_transfer_params"]
    assert params["remote_bootstrap_addr"] == "http://[fd00::1]:8998"
    room = orjson.loads(SglangContract().meet(call(), six, D, None, NUMBER).decode_body)
    assert room["bootstrap_host"] == "[fd00::1]"
    assert "addr_[fd00::1]:8998___" in P2pNcclContract().meet(call(), six, D, None, NUMBER).request_id


@pytest.mark.parametrize("fields", [{"n": 2}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}])
def test_mooncake_does_not_hand_over_several_under_one_id(fields: dict[str, Any]) -> None:
    assert not MooncakeContract().takes_whole(call("completions", **fields))
    assert SglangContract().takes_whole(call("completions", **fields)) == ("n" not in fields)
    assert P2pNcclContract().takes_whole(call("completions", **fields))


@pytest.mark.parametrize("number", [0, NUMBER, (1 << 128) - 1])
def test_sglang_legs_get_one_body_with_a_room(number: int) -> None:
    one = call(max_tokens=64, stream=True, odd=1.50)
    told = SglangContract().meet(one, P, D, None, number)
    assert told.prefill_body is told.decode_body and told.decode_body.startswith(one.body[:-1])
    made = orjson.loads(told.decode_body)
    room = made.pop("bootstrap_room")
    assert 0 <= room <= 2**63 - 1
    assert made == {**one.fields, "bootstrap_host": "10.0.0.1", "bootstrap_port": 8998}


def test_a_clients_own_room_is_replaced() -> None:
    one = call(bootstrap_room=7, bootstrap_host="evil")
    made = orjson.loads(SglangContract().meet(one, P, D, None, NUMBER).decode_body)
    assert made["bootstrap_host"] == "10.0.0.1" and made["bootstrap_room"] != 7
    assert one.fields["bootstrap_room"] == 7


def test_p2p_addresses_are_in_the_request_id() -> None:
    one = call("completions", max_tokens=64, min_tokens=5, n=2, stream=True, stream_options={})
    told = P2pNcclContract().meet(one, P, D, None, 10)
    assert told.request_id == f"___prefill_addr_10.0.0.1:8998___decode_addr_10.0.0.2:14579_{10:032x}"
    assert told.decode_body is one.body
    assert orjson.loads(told.prefill_body) == {
        "prompt": "x", "max_tokens": 1, "min_tokens": 1, "n": 2, "stream": False
    }  # fmt: skip
    assert not P2pNcclContract.overlaps
