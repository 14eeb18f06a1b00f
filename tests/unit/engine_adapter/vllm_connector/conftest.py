"""vLLM is not in this environment: its newest version is faked for whatever imports the connector here."""

from __future__ import annotations

from tests.unit.engine_adapter.vllm_connector import fake_vllm

fake_vllm.install((0, 32))
