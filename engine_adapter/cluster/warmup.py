"""A first prompt to every instance and one through the proxy: what is slow the first time is slow before a client."""

from __future__ import annotations

import asyncio

import aiohttp

from engine_adapter.cluster.errors import StartFailed
from engine_adapter.cluster.plan import Plan, PlannedProcess, bracketed, reachable

PROMPT = "The runner who carries the baton hands it over at full speed, and the next one never looks back. " * 2
"""Some forty tokens with a real tokenizer: more than one block, so that KV moves through the proxy."""
NUM_TOKENS = 4
TIMEOUT_S = 120.0
PROXY_PATIENCE_S = 20.0
"""The proxy may need a round of probes to see that its instances are well."""


async def warm_up(plan: Plan) -> None:
    """Raises StartFailed with the instance's own words if one does not answer."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        await asyncio.gather(*(_prompt(http, engine, plan.served_name) for engine in plan.of_kind("engine")))
        await _prompt(http, plan.proxy, plan.served_name, patience_s=PROXY_PATIENCE_S)


def base_url(process: PlannedProcess) -> str:
    return f"http://{bracketed(reachable(process.host))}:{process.port}"


async def _prompt(http: aiohttp.ClientSession, process: PlannedProcess, model: str, patience_s: float = 0.0) -> None:
    body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    deadline = asyncio.get_running_loop().time() + patience_s
    while True:
        problem, for_good = await _post(http, base_url(process) + "/v1/completions", body)
        if problem is None:
            return
        if for_good or asyncio.get_running_loop().time() >= deadline:
            raise StartFailed(f"the warm-up prompt to {process.name} ({process.address}) failed: {problem}")
        await asyncio.sleep(0.2)


async def _post(http: aiohttp.ClientSession, url: str, body: object) -> tuple[str | None, bool]:
    """What went wrong, None if nothing did, and whether trying again is useless."""
    try:
        async with http.post(url, json=body) as answer:
            if answer.status == 200:
                await answer.read()
                return None, True
            return f"status {answer.status}: {(await answer.text())[:300]}", answer.status < 500
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return f"{type(error).__name__}: {error}", False
