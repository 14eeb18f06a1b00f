"""The torch engine's KV transfer over its sidecar.

Called on the engine thread only (see kv_transfer.KvTransfer); completions come back through `poll()`. What happens
when the sidecar is lost is SidecarLink's; here its offers become void.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from engine_adapter.kv_transfer_params import InvalidKvTransferParams, RemotePrefill, parse_remote_prefill
from engine_adapter.sidecar_link import SidecarLink, pull_source
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.prefix_store import LoadResult
from engine_adapter.torch_engine.sequence import EngineRequestError
from engine_adapter.torch_engine.sidecar_prefix_store import SidecarPrefixStore
from sidecar.errors import SidecarError
from sidecar.protocol import KvLayout, OfferEnded, PullEnded, PullSource, SidecarLost

logger = logging.getLogger(__name__)


class SidecarKvTransfer:
    """A KvTransfer (see kv_transfer.py) that speaks to the sidecar at `socket_path`."""

    def __init__(
        self,
        socket_path: str,
        pool_fd: int,
        layout: KvLayout,
        *,
        lease_s: float,
        pull_timeout_s: float,
        wake: Callable[[], None],
        store_load_timeout_s: float = 5.0,
        observe_load: Callable[[LoadResult], None] = lambda load: None,
    ) -> None:
        self._lease_s = lease_s
        self._pull_timeout_s = pull_timeout_s
        self._link = SidecarLink(socket_path, lambda client: client.register_pool(pool_fd, layout), wake)
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
        """Refuse a decoder's incomplete parameters. Raises EngineRequestError with status 400."""
        _parse(params)

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

    def drop(self, params: dict[str, Any]) -> None:
        """Tell the producer that nobody will read this KV."""
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
        for event in self._link.poll():
            if isinstance(event, PullEnded):
                pulls.append(_result(event))
            elif isinstance(event, OfferEnded):
                self._forget(event.transfer_id, ended)
            elif isinstance(event, SidecarLost):
                self._void_offers(ended)
            else:
                self.store.take(event)
        return KvEvents(pulls=pulls, ended_offers=ended)

    def close(self) -> None:
        """Stop the link and let the sidecar go."""
        self._link.close()

    def _forget(self, transfer_id: str, ended: list[str]) -> None:
        request_id = self._request_of.pop(transfer_id, None)
        if request_id is not None:
            self._transfer_of.pop(request_id, "")
            ended.append(request_id)

    def _void_offers(self, ended: list[str]) -> None:
        """No consumer can confirm a read any more."""
        logger.warning("offers_void num=%d", len(self._request_of))
        ended += self._transfer_of
        self._transfer_of.clear()
        self._request_of.clear()


def _parse(params: dict[str, Any]) -> RemotePrefill:
    try:
        return parse_remote_prefill(params)
    except InvalidKvTransferParams as error:
        raise EngineRequestError(str(error), "BadRequestError", 400) from error


def _sources(params: dict[str, Any]) -> list[PullSource]:
    remote = _parse(params)
    return [pull_source(source, len(remote.block_ids)) for source in remote.sources]


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
