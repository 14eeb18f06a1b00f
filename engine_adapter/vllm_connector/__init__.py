"""Baton's KV connector for vLLM: `"kv_connector_module_path": "engine_adapter.vllm_connector"`.

Everything that vLLM asks of a connector is in `connector`; what differs between its versions is in `compat`.
"""

from engine_adapter.vllm_connector.connector import BatonConnector

__all__ = ["BatonConnector"]
