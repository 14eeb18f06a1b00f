"""The torch engine's KV transfer over its sidecar.

Called on the engine thread only (see kv_transfer.KvTransfer); completions come back through `poll()`. What happens
when the sidecar is lost is SidecarLink's; here its offers become void.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine_adapter.kv_transfer_params import IMAGES_KEY, InvalidKvTransferParams, RemotePrefill, parse_remote_prefill
from engine_adapter.metaserver_calls import MetaserverCalls
from engine_adapter.push_params import (
    calls_metaserver,
    check_metaserver,
    nothing_wanted,
    parse_push_landing,
    wants_push,
)
from engine_adapter.sidecar_link import Enter, SidecarLink, pull_source, push_landing, push_target
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.prefix_store import LoadResult
from engine_adapter.torch_engine.sequence import EngineRequestError
from engine_adapter.torch_engine.sidecar_prefix_store import SidecarPrefixStore
from sidecar.errors import SidecarError
from sidecar.protocol import KvLayout, OfferEnded, PullEnded, PullSource, Ready, SidecarLost, pack_block_ids

logger = logging.getLogger(__name__)


class SidecarKvTransfer:
    """A KvTransfer (see kv_transfer.py) that speaks to the sidecar at `socket_path`."""

    def __init__(
        self,
        socket_path: str,
        enter: Enter,
        layout: KvLayout,
        *,
        lease_s: float,
        pull_timeout_s: float,
        wake: Callable[[], None],
        store_load_timeout_s: float = 5.0,
        observe_load: Callable[[LoadResult], None] = lambda load: None,
        push_timeout_s: float = 120.0,
    ) -> None:
        self._lease_s = lease_s
        self._pull_timeout_s = pull_timeout_s
        self._push_timeout_s = push_timeout_s
        self._block_size = layout.block_size
        self._wake = wake
        self._metaserver = MetaserverCalls(wake)
        self._metaserver_failed: dict[str, str] = {}
        self._landed: set[str] = set()
        self._pushed: set[str] = set()
        """Requests whose transfer is a push."""
        self._link = SidecarLink(socket_path, enter, wake)
        self.store = SidecarPrefixStore(self._link, store_load_timeout_s, observe_load)
        """The prefix store behind the same sidecar; it hears of its events by `poll` here."""
        self._transfer_of: dict[str, str] = {}
        self._request_of: dict[str, str] = {}

    def start(self, timeout_s: float = 10.0) -> None:
        """Connect and hand the pool over. Raises SidecarError where that fails; afterwards the link mends itself."""
        self._link.start(timeout_s)

    @property
    def available(self) -> bool:
        """False while the sidecar is away: then offers and pulls fail at once."""
        return self._link.client is not None

    def check(self, params: dict[str, Any]) -> None:
        """Refuse incomplete parameters of a hand-off. Raises EngineRequestError with status 400."""
        try:
            if calls_metaserver(params):
                check_metaserver(params)
            elif wants_push(params):
                parse_push_landing(params)
            else:
                parse_remote_prefill(params)
        except InvalidKvTransferParams as error:
            raise EngineRequestError(str(error), "BadRequestError", 400) from error

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        """Lease `block_ids` to whoever is sent the returned parameters. Raises KvTransferUnavailable."""
        client = self._link.client
        if client is None:
            raise KvTransferUnavailable("the sidecar is away")
        try:
            offer = client.offer(request_id, block_ids, num_tokens, self._lease_s)
        except SidecarError as error:
            raise KvTransferUnavailable(str(error)) from error
        self._transfer_of[request_id] = offer.transfer_id
        self._request_of[offer.transfer_id] = request_id
        return RemotePrefill(
            engine_id=client.hello.engine_id,
            request_id=request_id,
            host=client.hello.host,
            port=client.hello.port,
            block_ids=tuple(block_ids),
            num_tokens=num_tokens,
            num_cached_tokens=num_cached_tokens,
            expires_at=offer.expires_at,
            transfer_id=offer.transfer_id,
            token=offer.token,
            epoch=offer.epoch,
        ).to_wire()

    def start_pull(self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int) -> None:
        """Fetch the lease's blocks from `first_block` on into `local_block_ids`; one PullResult follows, always."""
        self._link.pull(request_id, _sources(params), local_block_ids, first_block, self._pull_timeout_s)

    def land(
        self, request_id: str, params: dict[str, Any], local_block_ids: list[int], first_block: int, num_tokens: int
    ) -> None:
        """Land the blocks and ask the metaserver for a prefill that fills them; one PullResult follows, always."""
        landed = self._link.land(request_id, local_block_ids, first_block, self._push_timeout_s)
        name = params.get("request_id") or request_id
        landing = push_landing(self._link, landed, name, local_block_ids, self._block_size, num_tokens, first_block)
        if landing is None:
            self._wake()
            return
        self._landed.add(request_id)
        images = {key: params[key] for key in (IMAGES_KEY,) if key in params}
        self._metaserver.post(params["metaserver"], request_id, landing.to_wire() | images)

    def push(
        self, request_id: str, params: dict[str, Any], block_ids: list[int], num_tokens: int, ready: Ready
    ) -> None:
        """Lease blocks that are still computed to the decoder's landing. Raises KvTransferUnavailable."""
        client = self._link.client
        if client is None:
            raise KvTransferUnavailable("the sidecar is away")
        target = push_target(parse_push_landing(params))
        try:
            offer = client.push(request_id, block_ids, num_tokens, self._lease_s, target, ready)
        except SidecarError as error:
            raise KvTransferUnavailable(str(error)) from error
        self._transfer_of[request_id] = offer.transfer_id
        self._request_of[offer.transfer_id] = request_id
        self._pushed.add(request_id)

    def mark_ready(self, request_id: str, ready: Ready) -> None:
        """More of a push is computed; a lost sidecar has ended it anyway."""
        if (transfer_id := self._transfer_of.get(request_id)) is not None:
            self._link.mark_ready(transfer_id, ready)

    def drop(self, params: dict[str, Any]) -> None:
        """Tell the producer that nobody will read this KV; and those who wait for one of many prompts, not to."""
        if calls_metaserver(params):
            if params.get("num_children", 1) > 1:
                nothing = nothing_wanted(params["request_id"], self._block_size, params["num_tokens"])
                self._metaserver.post(params["metaserver"], "", nothing.to_wire())
            return
        for source in _sources(params):
            self._link.drop(source)

    def revoke(self, request_id: str) -> None:
        """Take an offer back whose answer never left."""
        if (transfer_id := self._transfer_of.get(request_id)) is not None:
            self._link.revoke(transfer_id)

    def abandon(self, request_id: str) -> None:
        """The pull's request is gone; its PullResult still follows, and only then are its blocks free."""
        self._link.abandon(request_id)

    def poll(self) -> KvEvents:
        """What has ended since the last call."""
        pulls: list[PullResult] = []
        ended: list[str] = []
        ended_pushes: list[tuple[str, str]] = []
        for request_id, why in self._metaserver.take_failed():
            if request_id in self._landed:
                self._metaserver_failed[request_id] = why
                self._link.abandon(request_id)
        for event in self._link.poll():
            if isinstance(event, PullEnded):
                pulls.append(self._result(event))
            elif isinstance(event, OfferEnded):
                self._forget(event.transfer_id, event.outcome, ended, ended_pushes)
            elif isinstance(event, SidecarLost):
                self._void_offers(ended, ended_pushes)
            else:
                self.store.take(event)
        return KvEvents(pulls=pulls, ended_offers=ended, ended_pushes=ended_pushes)

    def close(self) -> None:
        """Stop the link and let the sidecar go."""
        self._metaserver.close()
        self._link.close()

    def _forget(self, transfer_id: str, outcome: str, ended: list[str], ended_pushes: list[tuple[str, str]]) -> None:
        request_id = self._request_of.pop(transfer_id, None)
        if request_id is None:
            return
        self._transfer_of.pop(request_id, "")
        if request_id in self._pushed:
            self._pushed.discard(request_id)
            ended_pushes.append((request_id, outcome))
        else:
            ended.append(request_id)

    def _void_offers(self, ended: list[str], ended_pushes: list[tuple[str, str]]) -> None:
        """No consumer can confirm a read any more."""
        logger.warning("offers_void num=%d", len(self._request_of))
        for transfer_id in list(self._request_of):
            self._forget(transfer_id, "sidecar_lost", ended, ended_pushes)

    def _result(self, event: PullEnded) -> PullResult:
        """With the reason why it had to be abandoned, where that was the metaserver."""
        self._landed.discard(event.pull_id)
        result = _result(event)
        why = self._metaserver_failed.pop(event.pull_id, None)
        return result if event.ok or why is None else replace(result, reason="metaserver", message=why)


def _sources(params: dict[str, Any]) -> list[PullSource]:
    remote = parse_remote_prefill(params)
    packed = pack_block_ids(remote.block_ids)
    return [pull_source(source, len(remote.block_ids), packed) for source in remote.sources]


def _result(event: PullEnded) -> PullResult:
    return PullResult(
        request_id=event.pull_id,
        ok=event.ok,
        reason=event.reason,
        message=event.message,
        num_blocks=event.num_blocks,
        num_bytes=event.num_bytes,
        seconds=event.seconds,
        transport=event.transport,
        peer=event.peer,
    )
