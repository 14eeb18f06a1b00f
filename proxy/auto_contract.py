"""`--contract auto`: ask the instances which contract they speak.

Until one has answered, requests go by `pull`. The first prefiller that answers at all decides, once:

| it says | contract |
|---|---|
| `/server_info` or `/get_server_info` with a `disaggregation_mode` (SGLang) | sglang |
| `/server_info` naming a KV connector (vLLM in its development mode) | that connector's |
| its bootstrap port answers `/query` with engine ids | mooncake |
| nothing of these | pull |
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import NamedTuple

from proxy.bootstrap import Bootstrap, engines_of, query
from proxy.config import ProxyConfig, check_contract
from proxy.contracts import AUTO, CONTRACTS, Contract
from proxy.errors import ConfigError, UpstreamFailure
from proxy.instance import Fleet, Instance, Role

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0  # while no prefiller answers
INFO_PATHS = (b"/server_info", b"/get_server_info")
# MooncakeConnector is not here: vllm-ascend has used the name for its pull connector, so its bootstrap port decides.
CONNECTORS = {
    "BatonConnector": "pull",
    "LLMDataDistCMgrConnector": "pull",
    "MooncakeConnectorV1": "pull",
    "MooncakeLayerwiseConnector": "layerwise",
    "NixlConnector": "pull",
    "NixlPushConnector": "pull",
    "P2pNcclConnector": "p2p-nccl",
}
_CONNECTOR = re.compile(rb"""kv_connector\\?["']?\s*[:=]\s*\\?["'](\w+)""")
_SGLANG = re.compile(rb"""disaggregation_mode\\?["']?\s*[:=]\s*\\?["'](?:prefill|decode)\b""")


class Finding(NamedTuple):
    contract: str
    reason: str


class ContractFinder:
    """`start()` asks in the background where the contract is `auto`; `found` is what is spoken and why."""

    def __init__(
        self,
        config: ProxyConfig,
        fleet: Fleet,
        bootstrap: Bootstrap,
        speak: Callable[[Contract], None],
        loop: asyncio.AbstractEventLoop,
        bearer_line: bytes = b"",
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._bootstrap = bootstrap
        self._speak = speak
        self._loop = loop
        self._bearer_line = bearer_line
        self._task: asyncio.Task[None] | None = None
        self.found = Finding(config.contract, "configured")
        if config.contract == AUTO:
            self.found = Finding("pull", "no prefiller has answered yet")

    def state(self) -> dict[str, str]:
        return {"name": self.found.contract, "reason": self.found.reason}

    def start(self) -> None:
        if self._config.contract == AUTO:
            self._task = self._loop.create_task(self._find())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _find(self) -> None:
        finding = await self._until_one_answers()
        try:
            check_contract(self._config.model_copy(update={"contract": finding.contract}))
        except ConfigError as error:
            log.error("event=contract_unusable contract=%s reason=%r", finding.contract, str(error))
            finding = Finding("pull", f"{finding.reason}, but {error}")
        self.found = finding
        if finding.contract != "pull":
            self._speak(CONTRACTS[finding.contract]())
        log.info("event=contract_chosen contract=%s reason=%r", finding.contract, finding.reason)

    async def _until_one_answers(self) -> Finding:
        while True:
            for instance in self._fleet.members[Role.PREFILL]:
                finding = await self._ask(instance)
                if finding is not None:
                    return finding
            await asyncio.sleep(ASK_AGAIN_S)

    async def _ask(self, instance: Instance) -> Finding | None:
        for path in INFO_PATHS:
            try:
                answer = await instance.pool.call(
                    b"GET %b HTTP/1.1\r\n%b" % (path, self._bearer_line), timeout_s=self._config.health_timeout_s
                )
            except UpstreamFailure:
                return None
            if answer.status < 300 and (contract := contract_of(answer.body)) is not None:
                return Finding(contract, f"{instance.key} says so at {path.decode()}")
        endpoint = self._bootstrap.endpoint(instance)
        try:
            if engines_of(await query(endpoint, self._config, self._loop)):
                return Finding("mooncake", f"{endpoint} answers /query")
        except UpstreamFailure:
            pass
        return Finding("pull", f"{instance.key} does not say otherwise")


def contract_of(server_info: bytes) -> str | None:
    """By what an engine says of itself; None if it doesn't tell. A MultiConnector's parts are looked at in order."""
    if _SGLANG.search(server_info):
        return "sglang"
    names = (found.decode() for found in _CONNECTOR.findall(server_info))
    return next((CONNECTORS[name] for name in names if name in CONNECTORS), None)
