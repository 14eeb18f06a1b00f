"""The `kv_transfer_params` of the layerwise contract, as they stand on the wire (kv-contracts 2.4). Pure.

A decoder is asked with `{"do_remote_prefill": true, "metaserver": URL}`. It posts a `PushLanding` there for each
prompt, under the id that vLLM derives from X-Request-Id, and the proxy hands that verbatim to a prefiller, for several
prompts under `batch_kv_transfer_params`. Keys are vllm-ascend's, ours travel beside them under `baton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from engine_adapter.kv_transfer_params import BATON_PARAMS_VERSION, InvalidKvTransferParams, _integer, _port, _string

MAX_URL_CHARS = 2048


@dataclass(frozen=True, slots=True)
class PushLanding:
    """Blocks of a decoder that are kept for whoever presents `token` to its sidecar in time.

    Without a `landing_id` the decoder has the KV already: nothing is to be computed.
    """

    request_id: str
    engine_id: str
    host: str
    port: int
    block_ids: tuple[int, ...]
    block_size: int
    num_tokens: int
    first_block: int
    num_blocks: int
    """Blocks of the whole prompt; those from `first_block` on are wanted."""
    landing_id: str = ""
    token: str = ""
    epoch: str = ""

    def to_wire(self) -> dict[str, Any]:
        """What the decoder posts and the prefiller is sent."""
        return {
            "token_ids": [],
            "request_id": self.request_id,
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [list(self.block_ids)],
            "remote_block_size": [self.block_size],
            "remote_engine_id": self.engine_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "remote_tp_size": 1,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_cached_tokens": self.first_block * self.block_size,
            "baton": {
                "version": BATON_PARAMS_VERSION,
                "landing_id": self.landing_id,
                "token": self.token,
                "epoch": self.epoch,
                "num_tokens": self.num_tokens,
                "first_block": self.first_block,
                "num_blocks": self.num_blocks,
            },
        }


def push_failed(reason: str) -> dict[str, Any]:
    """What a prefiller answers that has computed the prompt, and knows by then that nobody was given its KV."""
    return {"baton": {"version": BATON_PARAMS_VERSION, "push_failed": reason}}


def child_id(response_id: str, prompt_index: int) -> str:
    """The id under which the proxy expects the call for one prompt; vLLM numbers those of /v1/completions only."""
    return f"{response_id}-{prompt_index}" if response_id.startswith("cmpl-") else response_id


def wants_push(params: dict[str, Any] | None) -> bool:
    """True where this request's KV is to be pushed to blocks that a decoder has landed."""
    baton = (params or {}).get("baton")
    return bool((params or {}).get("do_remote_decode")) and isinstance(baton, dict) and "landing_id" in baton


def calls_metaserver(params: dict[str, Any] | None) -> bool:
    """True where this request's prompt is computed elsewhere once the metaserver has been called."""
    return bool((params or {}).get("do_remote_prefill")) and "metaserver" in (params or {})


def for_child(params: dict[str, Any], response_id: str, prompt_index: int) -> dict[str, Any] | None:
    """A prefiller's parameters for one of its prompts; None where it has none. Raises InvalidKvTransferParams."""
    batch = params.get("batch_kv_transfer_params")
    if batch is None:
        return params if prompt_index == 0 else None
    return _of_child(batch, child_id(response_id, prompt_index))


def for_request(params: dict[str, Any], name: str) -> dict[str, Any]:
    """Likewise for an engine whose requests know their child's id only. Raises InvalidKvTransferParams."""
    batch = params.get("batch_kv_transfer_params")
    return params if batch is None else _of_child(batch, name)


def _of_child(batch: object, name: str) -> dict[str, Any]:
    child = batch.get(name) if isinstance(batch, dict) else None
    if not isinstance(child, dict) or not wants_push(child):
        raise InvalidKvTransferParams("batch_kv_transfer_params", f"has nothing for {name!r}")
    return child


def nothing_wanted(request_id: str, block_size: int, num_tokens: int) -> PushLanding:
    """Of a prompt whose KV a decoder has: only those who wait for one of many prompts need to know."""
    return PushLanding(request_id, "", "", 0, (), block_size, num_tokens, 0, 0)


def check_metaserver(params: dict[str, Any]) -> str:
    """The metaserver's URL. Raises InvalidKvTransferParams."""
    url = params.get("metaserver")
    if not isinstance(url, str) or len(url) > MAX_URL_CHARS:
        raise InvalidKvTransferParams("metaserver", "must be a URL")
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise InvalidKvTransferParams("metaserver", f"must be a URL like http://HOST:PORT/v1/metaserver, not {url!r}")
    return url


def parse_push_landing(params: dict[str, Any]) -> PushLanding:
    """Read what a prefiller was sent; a missing or mistyped key raises InvalidKvTransferParams."""
    baton = params.get("baton")
    if not isinstance(baton, dict):
        raise InvalidKvTransferParams("baton", "is missing: these blocks were not landed by our connector")
    version = _integer(baton, "version", "baton.version")
    if version != BATON_PARAMS_VERSION:
        raise InvalidKvTransferParams("baton.version", f"is {version}, this engine speaks {BATON_PARAMS_VERSION}")
    wanted = bool(baton.get("landing_id"))
    return PushLanding(
        request_id=_string(params, "request_id"),
        engine_id=_string(params, "remote_engine_id") if wanted else "",
        host=_string(params, "remote_host") if wanted else "",
        port=_port(params, "remote_port") if wanted else 0,
        block_ids=(),
        block_size=0,
        num_tokens=_integer(baton, "num_tokens", "baton.num_tokens"),
        first_block=_integer(baton, "first_block", "baton.first_block"),
        num_blocks=_integer(baton, "num_blocks", "baton.num_blocks"),
        landing_id=_string(baton, "landing_id", "baton.landing_id") if wanted else "",
        token=_string(baton, "token", "baton.token") if wanted else "",
        epoch=_string(baton, "epoch", "baton.epoch") if wanted else "",
    )
