"""What an engine says of itself, and the contract that follows."""

from __future__ import annotations

import pytest

from proxy.auto_contract import contract_of
from proxy.bootstrap import engines_of
from proxy.contracts.pair import EngineRank
from proxy.errors import UpstreamFailure


@pytest.mark.parametrize(
    ("said", "contract"),
    [
        (b'{"disaggregation_mode":"prefill","model_path":"m"}', "sglang"),
        (b'{"server_args":{"disaggregation_mode": "decode"}}', "sglang"),
        (b'{"disaggregation_mode":"null"}', None),
        (b"""{"vllm_config":"kv_transfer_config=KVTransferConfig(kv_connector='NixlConnector', x=1)"}""", "pull"),
        (b'{"vllm_config":{"kv_transfer_config":{"kv_connector":"MooncakeLayerwiseConnector"}}}', "layerwise"),
        (b'{"c":"{\\"kv_connector\\": \\"P2pNcclConnector\\"}"}', "p2p-nccl"),
        (b'{"kv_connector":"MultiConnector","connectors":[{"kv_connector":"NixlConnector"}]}', "pull"),
        (b'{"kv_connector":"MooncakeConnector"}', None),  # of vLLM or of vllm-ascend: its bootstrap port decides
        (b'{"kv_connector":null}', None),
        (b"{}", None),
        (b"<html>", None),
    ],
)
def test_the_contract_an_engine_speaks(said: bytes, contract: str | None) -> None:
    assert contract_of(said) == contract


def test_engines_come_by_rank() -> None:
    said = b'{"10":{"engine_id":"c"},"2":{"engine_id":"b","worker_addr":{}},"0":{"engine_id":"a"}}'
    assert engines_of(said) == [EngineRank(0, "a"), EngineRank(2, "b"), EngineRank(10, "c")]
    assert engines_of(b"{}") == []


@pytest.mark.parametrize("said", [b"", b"[]", b"[1]", b'{"x":{"engine_id":"a"}}', b'{"0":{}}', b'{"0":"a"}'])
def test_another_answer_is_a_failure(said: bytes) -> None:
    with pytest.raises(UpstreamFailure):
        engines_of(said)
