"""The entry point `vllm.general_plugins`: makes the name BatonConnector known without a module path."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory


def register() -> None:
    """Called by vLLM in every process, also more than once."""
    if "BatonConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("BatonConnector", "engine_adapter.vllm_connector", "BatonConnector")
