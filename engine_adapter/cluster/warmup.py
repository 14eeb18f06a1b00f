"""A first prompt to every instance and one through the proxy: what is slow the first time is slow before a client."""

from __future__ import annotations

import asyncio

import aiohttp

from engine_adapter.cluster.errors import StartFailed
from engine_adapter.cluster.plan import Plan, PlannedProcess, bracketed, reachable
from engine_adapter.cluster.share import Share

PROMPT = "The runner who carries the baton hands it over at full speed, and the next one never looks back. " * 2
"""Some forty tokens with a real tokenizer: more than one block, so that KV moves through the proxy."""
NUM_TOKENS = 4
TIMEOUT_S = 120.0
FIRST_TIMEOUT_S = 600.0
"""Of an NPU's first prompt, for which it may have to compile."""
PROXY_PATIENCE_S = 20.0
"""The proxy may need a round of probes to see that its instances are well."""


async def warm_up(plan: Plan) -> None:
    """Raises StartFailed with the instance's own words if one does not answer."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        await asyncio.gather(*(_first(http, engine, plan.served_name) for engine in plan.of_kind("engine")))
        await _first(http, plan.proxy, plan.served_name, patience_s=PROXY_PATIENCE_S)


async def _first(http: aiohttp.ClientSession, process: PlannedProcess, model: str, patience_s: float = 0.0) -> None:
    problem = await _prompt(http, base_url(process), model, patience_s)
    if problem:
        raise StartFailed(f"the warm-up prompt to {process.name} ({process.address}) failed: {problem}")


def base_url(process: PlannedProcess) -> str:
    return f"http://{bracketed(reachable(process.host))}:{process.port}"


async def preheat(share: Share, num: int, timeout_s: float = FIRST_TIMEOUT_S) -> list[str]:
    """`num` prompts to each API server of a share, one after the other, then through its proxy as many for each
    prefiller (operators of NPUs reach their speed after some rounds). A line for each that did not answer."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    proxy = share.proxy_address
    async with aiohttp.ClientSession(timeout=timeout) as http:
        found = await asyncio.gather(
            *(_several(http, name, address, share.served_name, num) for name, address in share.to_prompt.items())
        )
        if proxy and num:
            lanes = (_several(http, "proxy", proxy, share.served_name, num) for _ in range(share.num_prefillers))
            found += await asyncio.gather(*lanes)
    return list(dict.fromkeys(problem for problem in found if problem))


async def _several(http: aiohttp.ClientSession, name: str, address: str, model: str, num: int) -> str:
    patience_s = PROXY_PATIENCE_S if name == "proxy" else 0.0
    for _ in range(num):
        problem = await _prompt(http, f"http://{address}", model, patience_s)
        if problem:
            return f"the warm-up prompt to {name} ({address}) failed: {problem}"
    return ""


async def _prompt(http: aiohttp.ClientSession, url: str, model: str, patience_s: float = 0.0) -> str:
    """What went wrong; empty: nothing did."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    deadline = asyncio.get_running_loop().time() + patience_s
    while True:
        problem, for_good = await _post(http, url + "/v1/completions", body)
        if problem is None:
            return ""
        if for_good or asyncio.get_running_loop().time() >= deadline:
            return problem
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
