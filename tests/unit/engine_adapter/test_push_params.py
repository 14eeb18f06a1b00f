from __future__ import annotations

import json

import pytest

from engine_adapter.kv_transfer_params import InvalidKvTransferParams
from engine_adapter.push_params import (
    PushLanding,
    calls_metaserver,
    check_metaserver,
    child_id,
    for_child,
    parse_push_landing,
    wants_push,
)

LANDING = PushLanding("cmpl-r-0", "d", "10.0.0.1", 7000, (4, 5), 16, 50, 2, 4, "l", "t", "e")


def test_it_survives_the_wire_and_has_vllm_ascends_keys() -> None:
    wire = json.loads(json.dumps(LANDING.to_wire()))
    read = parse_push_landing(wire)
    assert (read.host, read.port, read.landing_id, read.token, read.epoch) == ("10.0.0.1", 7000, "l", "t", "e")
    assert (read.num_tokens, read.first_block, read.num_blocks) == (50, 2, 4)
    assert wire["remote_block_ids"] == [[4, 5]] and wire["remote_cached_tokens"] == 32
    assert wants_push(wire) and not calls_metaserver(wire)


def test_nothing_wanted_needs_no_address() -> None:
    wire = PushLanding("r", "", "", 0, (), 16, 50, 0, 0).to_wire()
    assert wants_push(wire) and not parse_push_landing(wire).landing_id


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("remote_host", "", "remote_host"),
        ("remote_port", 0, "remote_port"),
        ("request_id", None, "request_id"),
        ("baton", None, "baton"),
        ("baton", {"version": 9}, "baton.version"),
        ("baton", {"version": 1, "num_tokens": -1}, "baton.num_tokens"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: object, named: str) -> None:
    with pytest.raises(InvalidKvTransferParams, match=named.replace(".", r"\.")):
        parse_push_landing(LANDING.to_wire() | {key: value})


@pytest.mark.parametrize("url", [None, 7, "", "host:80", "ftp://h/x", "http://", "http://h:99999999/x", "x" * 3000])
def test_a_metaserver_is_a_url(url: object) -> None:
    with pytest.raises(InvalidKvTransferParams, match="metaserver"):
        check_metaserver({"do_remote_prefill": True, "metaserver": url})
    assert check_metaserver({"metaserver": "http://[::1]:8000/v1/metaserver"}).endswith("metaserver")


def test_children_are_named_as_vllm_names_them() -> None:
    assert child_id("cmpl-r", 3) == "cmpl-r-3"
    assert child_id("chatcmpl-r", 0) == "chatcmpl-r"


def test_each_prompt_finds_its_own() -> None:
    first, second = LANDING.to_wire(), PushLanding("cmpl-r-1", "d", "h", 1, (), 16, 9, 0, 1, "l2", "t", "e").to_wire()
    assert for_child(first, "cmpl-r", 0) == first and for_child(first, "cmpl-r", 1) is None
    batch = {**first, "batch_kv_transfer_params": {"cmpl-r-0": first, "cmpl-r-1": second}}
    assert for_child(batch, "cmpl-r", 1) == second
    with pytest.raises(InvalidKvTransferParams, match="has nothing for 'cmpl-r-2'"):
        for_child(batch, "cmpl-r", 2)
