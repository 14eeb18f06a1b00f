"""The engine's KV transfer over its sidecar.

Called on the engine thread only (see kv_transfer.KvTransfer); completions come back through `poll()`. A lost sidecar
is a normal event: every transfer it carried ends as failed, every offer as void, and a link thread connects again,
hands the pool over once more and goes on. Nothing here waits for a transfer, only for control round trips.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from engine_adapter.kv_transfer_params import InvalidKvTransferParams, RemotePrefill, parse_remote_prefill
from engine_adapter.torch_engine.kv_transfer import KvEvents, KvTransferUnavailable, PullResult
from engine_adapter.torch_engine.sequence import EngineRequestError
from sidecar.client import SidecarClient
from sidecar.errors import SidecarError
from sidecar.protocol import KvLayout, OfferEnded, PullEnded, PullSource, SidecarLost

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 2.0
"""A control call is one round trip over a unix socket; past this the sidecar counts as lost."""
RECONNECT_DELAYS_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Waits between attempts; the last one repeats. A restarted sidecar is found within a second."""
FENCE_GRACE_S = 3.0
"""A sidecar ends every pull by its deadline; one that is this much late hangs, and is killed so that it can't write."""
MAX_QUEUED_DROPS = 4096
"""Releases kept for a sidecar that is away; beyond it the producer's lease time does the work."""


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
    ) -> None:
        self._socket_path = socket_path
        self._pool_fd = pool_fd
        self._layout = layout
        self._lease_s = lease_s
        self._pull_timeout_s = pull_timeout_s
        self._wake = wake
        self._client: SidecarClient | None = None
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._transfer_of: dict[str, str] = {}
        self._request_of: dict[str, str] = {}
        self._overdue_at: dict[str, float] = {}
        self._failed_at_once: list[PullResult] = []
        self._drops: deque[PullSource] = deque(maxlen=MAX_QUEUED_DROPS)
        self._link_thread = threading.Thread(target=self._keep_linked, name="sidecar-link", daemon=True)

    def start(self, timeout_s: float = 10.0) -> None:
        """Connect and hand the pool over. Raises SidecarError where that fails; afterwards the link mends itself."""
        self._client = self._connect(timeout_s)
        self._link_thread.start()

    @property
    def available(self) -> bool:
        """False while the sidecar is away: then offers and pulls fail at once."""
        return self._client is not None

    def check(self, params: dict[str, Any]) -> None:
        """Refuse a decoder's incomplete parameters. Raises EngineRequestError with status 400."""
        _parse(params)

    def offer(self, request_id: str, block_ids: list[int], num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        """Lease `block_ids` to whoever is sent the returned parameters. Raises KvTransferUnavailable."""
        client = self._client
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
        client = self._client
        source = _source(_parse(params))
        message = "the sidecar is away"
        if client is not None:
            self._overdue_at[request_id] = time.monotonic() + self._pull_timeout_s + FENCE_GRACE_S
            try:
                client.pull(
                    request_id, source, local_block_ids, first_block=first_block, deadline_s=self._pull_timeout_s
                )
                return
            except SidecarError as error:
                message = str(error)
        self._overdue_at.pop(request_id, None)
        self._drops.append(source)
        self._failed_at_once.append(_failed(request_id, source, message))

    def drop(self, params: dict[str, Any]) -> None:
        """Tell the producer that nobody will read this KV."""
        self._drops.append(_source(_parse(params)))
        self._flush_drops()

    def revoke(self, request_id: str) -> None:
        """Take an offer back whose answer never left."""
        transfer_id = self._transfer_of.get(request_id)
        client = self._client
        if transfer_id is None or client is None:
            return
        try:
            client.revoke(transfer_id)
        except SidecarError as error:
            logger.warning("revoke_failed request_id=%s error=%s", request_id, error)

    def abandon(self, request_id: str) -> None:
        """The pull's request is gone; its PullResult still follows, and only then are its blocks free."""
        client = self._client
        if client is None:
            return
        try:
            client.abandon(request_id)
        except SidecarError as error:
            logger.warning("abandon_failed request_id=%s error=%s", request_id, error)

    def poll(self) -> KvEvents:
        """What has ended since the last call."""
        pulls, self._failed_at_once = self._failed_at_once, []
        ended: list[str] = []
        client = self._client
        if client is not None:
            for event in client.poll():
                if isinstance(event, PullEnded):
                    self._overdue_at.pop(event.pull_id, None)
                    pulls.append(_result(event))
                elif isinstance(event, OfferEnded):
                    self._forget(event.transfer_id, ended)
                elif isinstance(event, SidecarLost):
                    self._unlink(client, event.message, ended)
            self._flush_drops()
            self._fence_if_hung(client)
        return KvEvents(pulls=pulls, ended_offers=ended)

    def close(self) -> None:
        """Stop the link and let the sidecar go."""
        self._closed.set()
        self._lost.set()
        if self._link_thread.is_alive():
            self._link_thread.join(CONTROL_TIMEOUT_S)
        if self._client is not None:
            self._client.close()
            self._client = None

    def _fence_if_hung(self, client: SidecarClient) -> None:
        """Kill a sidecar that neither answers nor ends its pulls: nothing else makes sure that it writes no more."""
        now = time.monotonic()
        overdue = [request_id for request_id, at in self._overdue_at.items() if at < now]
        if self._client is client and (overdue or client.unresponsive):
            logger.error("sidecar_hangs socket=%s pulls_overdue=%d action=kill", self._socket_path, len(overdue))
            self._overdue_at.clear()
            client.fence()

    def _forget(self, transfer_id: str, ended: list[str]) -> None:
        request_id = self._request_of.pop(transfer_id, None)
        if request_id is not None:
            self._transfer_of.pop(request_id, "")
            ended.append(request_id)

    def _unlink(self, client: SidecarClient, message: str, ended: list[str]) -> None:
        """The sidecar is gone: its offers are void, because no consumer can confirm a read any more."""
        logger.error(
            "sidecar_lost socket=%s offers_void=%d error=%s", self._socket_path, len(self._request_of), message
        )
        ended += self._transfer_of
        self._transfer_of.clear()
        self._request_of.clear()
        self._client = None
        client.close()
        self._lost.set()

    def _flush_drops(self) -> None:
        client = self._client
        while client is not None and self._drops:
            try:
                client.drop(self._drops[0])
            except SidecarError as error:
                logger.warning("drop_delayed waiting=%d error=%s", len(self._drops), error)
                return
            self._drops.popleft()

    def _connect(self, timeout_s: float) -> SidecarClient:
        client = SidecarClient.connect(self._socket_path, on_event=self._wake, timeout_s=timeout_s)
        try:
            epoch = client.register_pool(self._pool_fd, self._layout)
        except BaseException:
            client.close()
            raise
        logger.info("sidecar_linked socket=%s epoch=%s", self._socket_path, epoch)
        return client

    def _keep_linked(self) -> None:
        """The link thread: sleeps until the sidecar is lost, then connects until it is back."""
        attempt = 0
        while not self._closed.is_set():
            if not self._lost.is_set():
                self._lost.wait()
                attempt = 0
                continue
            try:
                client = self._connect(CONTROL_TIMEOUT_S)
            except (SidecarError, OSError) as error:
                if attempt == 0:
                    logger.warning("sidecar_away socket=%s error=%s", self._socket_path, error)
                self._closed.wait(RECONNECT_DELAYS_S[min(attempt, len(RECONNECT_DELAYS_S) - 1)])
                attempt += 1
                continue
            self._lost.clear()
            self._client = client
            self._wake()


def _parse(params: dict[str, Any]) -> RemotePrefill:
    try:
        return parse_remote_prefill(params)
    except InvalidKvTransferParams as error:
        raise EngineRequestError(str(error), "BadRequestError", 400) from error


def _source(remote: RemotePrefill) -> PullSource:
    return PullSource(
        host=remote.host,
        port=remote.port,
        engine_id=remote.engine_id,
        transfer_id=remote.transfer_id,
        token=remote.token,
        epoch=remote.epoch,
        num_blocks=len(remote.block_ids),
    )


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


def _failed(request_id: str, source: PullSource, message: str) -> PullResult:
    peer = f"{source.engine_id}@{source.host}:{source.port}"
    return PullResult(request_id, False, "sidecar_lost", message, 0, 0, 0.0, "", peer)
