"""`--contract auto`: the instances are asked, at start or when they come up."""

from __future__ import annotations

import pytest

from tests.proxy_blackbox.contracts import CONTRACTS, SHORT_TIMEOUTS, ports_flags
from tests.proxy_blackbox.harness import CHAT, Engines, Proxy, body_of, eventually, settled, text_for


@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_contract_is_found_when_an_instance_answers(contract: str) -> None:
    engines = Engines(1, 1, "--contract", contract)
    try:
        engines.stop(engines.prefill[0])
        proxy = Proxy(engines, *ports_flags(engines), *SHORT_TIMEOUTS)
        try:
            spoken = proxy.get("/instances").json["contract"]
            assert spoken == {"name": "pull", "reason": "no prefiller has answered yet"}
            engines.start(engines.prefill[0])
            eventually(lambda: "event=contract_chosen" not in proxy.process.output, "no contract was chosen", 15)
            spoken = proxy.get("/instances").json["contract"]
            assert spoken["name"] == contract and spoken["reason"]
            fields = body_of(CHAT, stream=True)
            eventually(lambda: proxy.post(CHAT, fields).status != 200, "the prefiller is not back")
            assert proxy.post(CHAT, fields).text == text_for(fields)
            settled(proxy, engines)
        finally:
            proxy.stop()
    finally:
        engines.process.stop()
