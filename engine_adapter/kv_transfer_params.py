"""The `kv_transfer_params` of the pull contract, as they stand on the wire.

Keys and meanings are vLLM's NIXL pull contract (vLLM 0.13 to 0.32), so that a proxy which knows nothing of us can
carry them; ours travel beside them under the key `baton`. Pure: no clock, no socket.

A prefiller is asked with `{"do_remote_decode": true}`; its answer carries a `RemotePrefill`, which the proxy copies
verbatim to a decoder. `release_only` in a decoder's request says that nobody wants the KV any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BATON_PARAMS_VERSION = 1
"""Version of the `baton` object. 1: transfer_id, token, epoch, num_blocks, and other_ranks where there are any."""
IMAGES_KEY = "remote_mm_hashes"
"""Content hashes of the images in the prompt, in hex, by whoever wrote the parameters; absent without images. The
image behind a URL may be another one a second later."""
_RANK_KEYS = ("host", "port", "transfer_id", "token", "epoch")


class InvalidKvTransferParams(ValueError):
    """The caller's fault: `field` is missing or wrong. Answer with 400 and never hand the request to the engine."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"kv_transfer_params.{field} {reason}")
        self.field = f"kv_transfer_params.{field}"


@dataclass(frozen=True, slots=True)
class KvSource:
    """One rank's lease, and the sidecar that gives the KV to whoever presents `token` in time."""

    engine_id: str
    host: str
    port: int
    transfer_id: str
    token: str
    epoch: str


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """KV that a prefiller holds for whoever presents `token` to its sidecar at `host`:`port` in time."""

    engine_id: str
    request_id: str
    host: str
    port: int
    block_ids: tuple[int, ...]
    num_tokens: int
    num_cached_tokens: int
    expires_at: float
    """Unix seconds, by the prefiller's clock; a hint, the prefiller's sidecar decides."""
    transfer_id: str
    token: str
    epoch: str
    other_ranks: tuple[KvSource, ...] = ()
    """The leases of tensor-parallel ranks 1 and up; rank 0's is in the fields above."""

    @property
    def sources(self) -> tuple[KvSource, ...]:
        """One lease a rank, in rank order."""
        first = KvSource(self.engine_id, self.host, self.port, self.transfer_id, self.token, self.epoch)
        return (first, *self.other_ranks)

    def to_wire(self) -> dict[str, Any]:
        """What the prefiller answers and the decoder is sent."""
        other_ranks = [{key: getattr(source, key) for key in _RANK_KEYS} for source in self.other_ranks]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(self.block_ids)],
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "tp_size": 1 + len(self.other_ranks),
            "remote_num_tokens": self.num_tokens,
            "remote_blocks_expiry_time": self.expires_at,
            "remote_prefill_cached_tokens": self.num_cached_tokens,
            "baton": {
                "version": BATON_PARAMS_VERSION,
                "transfer_id": self.transfer_id,
                "token": self.token,
                "epoch": self.epoch,
                "num_blocks": len(self.block_ids),
                **({"other_ranks": other_ranks} if other_ranks else {}),
            },
        }


def wants_remote_decode(params: dict[str, Any] | None) -> bool:
    """True where this request's KV is to be kept for a decoder elsewhere."""
    return bool(params) and bool((params or {}).get("do_remote_decode"))


def wants_remote_prefill(params: dict[str, Any] | None) -> bool:
    """True where this request's prompt was computed elsewhere."""
    return bool(params) and bool((params or {}).get("do_remote_prefill"))


def is_of_images(params: dict[str, Any], hashes: list[str]) -> bool:
    """True where these parameters were written for a prompt with the same images."""
    return bool(params.get(IMAGES_KEY, []) == hashes)


def parse_remote_prefill(params: dict[str, Any]) -> RemotePrefill:
    """Read what a decoder was sent. Unknown keys are ignored, a missing or mistyped one raises InvalidKvTransferParams.

    Incomplete parameters have to be refused here: vLLM's own connectors die of them (kv-contracts section 2).
    """
    baton = params.get("baton")
    if not isinstance(baton, dict):
        raise InvalidKvTransferParams("baton", "is missing: this KV was not handed out by our connector")
    version = _integer(baton, "version", "baton.version")
    if version != BATON_PARAMS_VERSION:
        raise InvalidKvTransferParams("baton.version", f"is {version}, this engine speaks {BATON_PARAMS_VERSION}")
    block_ids = _block_ids(params.get("remote_block_ids"))
    if _integer(baton, "num_blocks", "baton.num_blocks") != len(block_ids):
        raise InvalidKvTransferParams("baton.num_blocks", f"is not the number of remote_block_ids ({len(block_ids)})")
    expires_at = params.get("remote_blocks_expiry_time", 0.0)
    if isinstance(expires_at, bool) or not isinstance(expires_at, int | float):
        raise InvalidKvTransferParams("remote_blocks_expiry_time", "must be a number")
    return RemotePrefill(
        engine_id=_string(params, "remote_engine_id"),
        request_id=_string(params, "remote_request_id"),
        host=_string(params, "remote_host"),
        port=_port(params, "remote_port"),
        block_ids=block_ids,
        num_tokens=_integer(params, "remote_num_tokens"),
        num_cached_tokens=_integer(params, "remote_prefill_cached_tokens", default=0),
        expires_at=float(expires_at),
        transfer_id=_string(baton, "transfer_id", "baton.transfer_id"),
        token=_string(baton, "token", "baton.token"),
        epoch=_string(baton, "epoch", "baton.epoch"),
        other_ranks=_other_ranks(baton.get("other_ranks", []), _string(params, "remote_engine_id")),
    )


def _other_ranks(value: object, engine_id: str) -> tuple[KvSource, ...]:
    name = "baton.other_ranks"
    if not isinstance(value, list) or not all(isinstance(rank, dict) for rank in value):
        raise InvalidKvTransferParams(name, "must be a list of objects")
    return tuple(
        KvSource(
            engine_id=engine_id,
            host=_string(rank, "host", f"{name}.host"),
            port=_port(rank, "port", f"{name}.port"),
            transfer_id=_string(rank, "transfer_id", f"{name}.transfer_id"),
            token=_string(rank, "token", f"{name}.token"),
            epoch=_string(rank, "epoch", f"{name}.epoch"),
        )
        for rank in value
    )


def _block_ids(value: object) -> tuple[int, ...]:
    """One KV cache group, as a list of a list (vLLM 0.23 and later) or flat (until 0.18)."""
    if not isinstance(value, list):
        raise InvalidKvTransferParams("remote_block_ids", "must be a list")
    group: Sequence[object] = value
    if value and isinstance(value[0], list):
        if len(value) != 1:
            raise InvalidKvTransferParams("remote_block_ids", f"has {len(value)} KV cache groups, this engine has one")
        group = value[0]
    if not all(isinstance(block_id, int) and not isinstance(block_id, bool) and block_id >= 0 for block_id in group):
        raise InvalidKvTransferParams("remote_block_ids", "must hold block ids of 0 or more")
    return tuple(block_id for block_id in group if isinstance(block_id, int))


def _port(source: dict[str, Any], key: str, field: str | None = None) -> int:
    port = _integer(source, key, field)
    if not 0 < port < 65536:
        raise InvalidKvTransferParams(field or key, "must be between 1 and 65535")
    return port


def _string(source: dict[str, Any], key: str, field: str | None = None) -> str:
    value = source.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidKvTransferParams(field or key, "must be a non-empty string")
    return value


def _integer(source: dict[str, Any], key: str, field: str | None = None, default: int | None = None) -> int:
    value = source.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidKvTransferParams(field or key, "must be an integer of 0 or more")
    return value
