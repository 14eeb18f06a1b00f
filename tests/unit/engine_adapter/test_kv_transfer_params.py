"""The pull contract's parameters: what is written is read back, and what is incomplete is refused by name."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from engine_adapter.kv_transfer_params import (
    InvalidKvTransferParams,
    RemotePrefill,
    parse_remote_prefill,
    wants_remote_decode,
    wants_remote_prefill,
)

REMOTE = RemotePrefill(
    engine_id="p0",
    request_id="cmpl-1",
    host="127.0.0.1",
    port=7001,
    block_ids=(3, 5, 8),
    num_tokens=40,
    num_cached_tokens=16,
    expires_at=1700000000.5,
    transfer_id="t1",
    token="secret",
    epoch="e1",
)
MISSING = object()


def test_what_is_written_is_read_back_through_json() -> None:
    wire = json.loads(json.dumps(REMOTE.to_wire()))
    assert parse_remote_prefill(wire) == REMOTE
    assert wants_remote_prefill(wire)
    assert not wants_remote_decode(wire)


def test_a_proxy_that_knows_only_nixl_finds_its_keys() -> None:
    nixl_pull_keys = {
        "do_remote_prefill", "do_remote_decode", "remote_block_ids", "remote_engine_id", "remote_request_id",
        "remote_host", "remote_port", "tp_size", "remote_num_tokens", "remote_blocks_expiry_time",
    }  # fmt: skip
    assert nixl_pull_keys <= REMOTE.to_wire().keys()


def test_unknown_keys_and_flat_block_ids_are_read() -> None:
    wire = REMOTE.to_wire() | {"remote_block_ids": [3, 5, 8], "from_the_future": 1}
    assert parse_remote_prefill(wire) == REMOTE


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("baton",), MISSING),
        (("baton",), "text"),
        (("baton", "version"), 2),
        (("baton", "transfer_id"), MISSING),
        (("baton", "token"), ""),
        (("baton", "epoch"), 7),
        (("baton", "num_blocks"), 2),
        (("baton", "num_blocks"), True),
        (("remote_block_ids",), MISSING),
        (("remote_block_ids",), [[1], [2]]),
        (("remote_block_ids",), [[-1, 2, 3]]),
        (("remote_block_ids",), [["a", 2, 3]]),
        (("remote_engine_id",), None),
        (("remote_request_id",), MISSING),
        (("remote_host",), ""),
        (("remote_port",), 0),
        (("remote_port",), 65536),
        (("remote_port",), "7001"),
        (("remote_num_tokens",), -1),
        (("remote_blocks_expiry_time",), "soon"),
    ],
)
def test_what_is_missing_or_mistyped_is_refused_by_name(path: tuple[str, ...], value: Any) -> None:
    wire = copy.deepcopy(REMOTE.to_wire())
    target = wire if len(path) == 1 else wire[path[0]]
    if value is MISSING:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    with pytest.raises(InvalidKvTransferParams) as refusal:
        parse_remote_prefill(wire)
    assert path[-1] in refusal.value.field or refusal.value.field.endswith("num_blocks")


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}, {"do_remote_decode": None}])
def test_a_plain_request_wants_neither(params: dict[str, Any] | None) -> None:
    assert not wants_remote_decode(params)
    assert not wants_remote_prefill(params)
