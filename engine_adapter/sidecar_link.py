"""An engine process's tie to its sidecar, which mends itself: what every engine of ours shares.

A lost sidecar is a normal event: every pull it carried ends as failed, every offer is void, and a link thread connects
again, enters the pool once more and goes on. Nothing here waits for a transfer, only for control round trips.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from engine_adapter.kv_transfer_params import KvSource
from engine_adapter.push_params import PushLanding
from sidecar.client import SidecarClient
from sidecar.errors import SidecarError
from sidecar.protocol import (
    Event,
    Landing,
    PullEnded,
    PullSource,
    PushTarget,
    Ready,
    SidecarLost,
    StoreLoad,
    StoreLoadEnded,
    StoreRequest,
    StoreSave,
    StoreSaveEnded,
    store_refusal,
)  # fmt: skip

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 2.0
"""A control call is one round trip over a unix socket; past this the sidecar counts as lost."""
RECONNECT_DELAYS_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Waits between attempts; the last one repeats. A restarted sidecar is found within a second."""
FENCE_GRACE_S = 3.0
"""A sidecar ends every pull by its deadline; one that is this much late hangs, and is killed so that it can't write."""
MAX_QUEUED_DROPS = 4096
"""Releases kept for a sidecar that is away; beyond it the producer's lease time does the work."""

Enter = Callable[[SidecarClient], str]
"""What makes a new connection useful: registers the pool, or joins it; returns the pool's epoch. Raises SidecarError"""


class SidecarLink:
    """One connection at a time to the sidecar at `socket_path`. One thread uses it; `wake` is called on others (by
    `pull` on that one too) and may call `poll` where nothing is pulled."""

    def __init__(
        self, socket_path: str, enter: Enter, wake: Callable[[], object], fence_grace_s: float = FENCE_GRACE_S
    ) -> None:
        self._socket_path = socket_path
        self._fence_grace_s = fence_grace_s
        self._enter = enter
        self._wake = wake
        self._linked: tuple[SidecarClient, str] | None = None
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._overdue_at: dict[str, float] = {}
        self._failed_at_once: list[Event] = []
        self._drops: deque[PullSource] = deque(maxlen=MAX_QUEUED_DROPS)
        self._drop_lock = threading.Lock()
        self._fenced: SidecarClient | None = None
        self._thread = threading.Thread(target=self._keep_linked, name="sidecar-link", daemon=True)

    def start(self, timeout_s: float = 10.0) -> None:
        """Connect and enter. Raises SidecarError where that fails; afterwards the link mends itself."""
        self._linked = self._connect(timeout_s)
        self._thread.start()

    def start_later(self) -> None:
        """Connect in the background, as soon as the sidecar is there."""
        self._lost.set()
        self._thread.start()

    @property
    def client(self) -> SidecarClient | None:
        """The connection that is up; None while the sidecar is away."""
        return self._linked[0] if self._linked else None

    @property
    def epoch(self) -> str:
        """Of the pool that was entered over the connection that is up; "" while the sidecar is away."""
        return self._linked[1] if self._linked else ""

    def pull(
        self,
        pull_id: str,
        sources: Sequence[PullSource],
        local_block_ids: list[int],
        first_block: int,
        deadline_s: float,
    ) -> None:
        """Fetch blocks from `first_block` on into `local_block_ids`; one PullEnded follows, always.

        `sources` has the lease of each of the producer's ranks.
        """
        message = "the sidecar is away"
        if (client := self.client) is not None:
            self._overdue_at[pull_id] = time.monotonic() + deadline_s + self._fence_grace_s
            try:
                client.pull(pull_id, sources, local_block_ids, first_block=first_block, deadline_s=deadline_s)
                return
            except SidecarError as error:
                message = str(error)
        self._overdue_at.pop(pull_id, None)
        self._drops.extend(sources)
        peer = f"{sources[0].engine_id}@{sources[0].host}:{sources[0].port}"
        self._failed_at_once.append(PullEnded(pull_id, False, "sidecar_lost", message, 0, 0, 0.0, "", peer))

    def land(self, pull_id: str, local_block_ids: list[int], first_block: int, deadline_s: float) -> Landing | None:
        """Keep blocks for a producer that comes by itself; one PullEnded follows, always. None: it is about to."""
        message = "the sidecar is away"
        if (client := self.client) is not None:
            self._overdue_at[pull_id] = time.monotonic() + deadline_s + self._fence_grace_s
            try:
                return client.land(pull_id, local_block_ids, first_block=first_block, deadline_s=deadline_s)
            except SidecarError as error:
                message = str(error)
        self._overdue_at.pop(pull_id, None)
        self._failed_at_once.append(PullEnded(pull_id, False, "sidecar_lost", message, 0, 0, 0.0, "", ""))
        return None

    def mark_ready(self, transfer_id: str, ready: Ready, block_ids: Sequence[int] = ()) -> None:
        """More of a push is computed; a lost sidecar has ended it anyway. Sends, and waits for nothing."""
        if (client := self.client) is not None:
            with contextlib.suppress(SidecarError):
                client.mark_ready(transfer_id, ready, block_ids)

    def drop(self, source: PullSource) -> None:
        """Tell the producer that nobody will read this lease."""
        self._drops.append(source)
        self._flush_drops()

    def revoke(self, transfer_id: str) -> None:
        """Take an offer back; a lost sidecar has voided it anyway."""
        if (client := self.client) is not None:
            try:
                client.revoke(transfer_id)
            except SidecarError as error:
                logger.warning("revoke_failed transfer_id=%s error=%s", transfer_id, error)

    def abandon(self, pull_id: str) -> None:
        """Nobody wants this pull any more; its PullEnded still follows, and only then are its blocks free."""
        if (client := self.client) is not None:
            try:
                client.abandon(pull_id)
            except SidecarError as error:
                logger.warning("abandon_failed pull_id=%s error=%s", pull_id, error)

    def ask_store(self, request: StoreRequest, within_s: float) -> None:
        """Ask the prefix store; the event that answers follows, always. A sidecar that is late with it is killed."""
        message, key = "the sidecar is away", _store_key(request)
        if (client := self.client) is not None:
            if key:
                self._overdue_at[key] = time.monotonic() + within_s + self._fence_grace_s
            try:
                client.ask_store(request)
                return
            except SidecarError as error:
                message = str(error)
        self._overdue_at.pop(key, None)
        if (event := store_refusal(request, message, "sidecar_lost")) is not None:
            self._failed_at_once.append(event)

    def poll(self) -> list[Event]:
        """What has happened since the last call. After SidecarLost the link is down until it has mended itself."""
        events, self._failed_at_once = self._failed_at_once, []
        if (client := self.client) is not None:
            for event in client.poll():
                events.append(event)
                if isinstance(event, PullEnded):
                    self._overdue_at.pop(event.pull_id, None)
                elif isinstance(event, StoreLoadEnded | StoreSaveEnded):
                    self._overdue_at.pop(_store_key(event), None)
                elif isinstance(event, SidecarLost):
                    self._unlink(client, event.message)
            self._flush_drops()
            self._fence_if_hung(client)
        return events

    def overdue_s(self) -> float:
        """For how long the most overdue pull has been, and with it a sidecar that can't be killed from here."""
        return max((time.monotonic() - at for at in self._overdue_at.values()), default=0.0)

    def close(self) -> None:
        """Stop the thread and let the sidecar go."""
        self._closed.set()
        self._lost.set()
        if self._thread.is_alive():
            self._thread.join(CONTROL_TIMEOUT_S)
        if (client := self.client) is not None:
            self._linked = None
            client.close()

    def _fence_if_hung(self, client: SidecarClient) -> None:
        """Kill a sidecar that neither answers nor ends its pulls: nothing else makes sure that it writes no more."""
        overdue = self.overdue_s() > 0
        if self.client is client and self._fenced is not client and (overdue or client.unresponsive):
            logger.error("sidecar_hangs socket=%s pulls_overdue=%s action=kill", self._socket_path, overdue)
            self._fenced = client
            client.fence()

    def _unlink(self, client: SidecarClient, message: str) -> None:
        logger.error("sidecar_lost socket=%s error=%s", self._socket_path, message)
        self._linked = None
        self._overdue_at.clear()
        client.close()
        self._lost.set()

    def _flush_drops(self) -> None:
        client = self.client
        with self._drop_lock:
            while client is not None and self._drops:
                try:
                    client.drop(self._drops[0])
                except SidecarError as error:
                    logger.warning("drop_delayed waiting=%d error=%s", len(self._drops), error)
                    return
                self._drops.popleft()

    def _connect(self, timeout_s: float) -> tuple[SidecarClient, str]:
        client = SidecarClient.connect(self._socket_path, on_event=self._wake, timeout_s=timeout_s)
        try:
            epoch = self._enter(client)
        except BaseException:
            client.close()
            raise
        logger.info("sidecar_linked socket=%s epoch=%s", self._socket_path, epoch)
        return client, epoch

    def _keep_linked(self) -> None:
        """The link thread: sleeps until the sidecar is lost, then connects until it is back."""
        attempt = 0
        while not self._closed.is_set():
            if not self._lost.is_set():
                self._lost.wait()
                attempt = 0
                continue
            try:
                linked = self._connect(CONTROL_TIMEOUT_S)
            except (SidecarError, OSError) as error:
                if attempt == 0:
                    logger.warning("sidecar_away socket=%s error=%s", self._socket_path, error)
                self._closed.wait(RECONNECT_DELAYS_S[min(attempt, len(RECONNECT_DELAYS_S) - 1)])
                attempt += 1
                continue
            self._lost.clear()
            self._linked = linked
            self._wake()


def _store_key(message: StoreRequest | StoreLoadEnded | StoreSaveEnded) -> str:
    """Under what an answer is waited for; "" for what touches no block."""
    if isinstance(message, StoreLoad | StoreLoadEnded):
        return f"store load {message.load_id}"
    return f"store save {message.save_id}" if isinstance(message, StoreSave | StoreSaveEnded) else ""


def pull_source(source: KvSource, num_blocks: int, packed_block_ids: bytes = b"") -> PullSource:
    """A lease as the sidecar's protocol names it."""
    return PullSource(
        host=source.host,
        port=source.port,
        engine_id=source.engine_id,
        transfer_id=source.transfer_id,
        token=source.token,
        epoch=source.epoch,
        num_blocks=num_blocks,
        packed_block_ids=packed_block_ids,
    )


def push_target(landing: PushLanding) -> PushTarget:
    """A decoder's landing, likewise."""
    return PushTarget(landing.host, landing.port, landing.engine_id, landing.landing_id, landing.token, landing.epoch)


def push_landing(
    link: SidecarLink, landing: Landing | None, request_id: str, block_ids: Sequence[int], block_size: int,
    num_tokens: int, first_block: int,
) -> PushLanding | None:  # fmt: skip
    """What a decoder posts of blocks that it has just landed through `link`; None if the sidecar was lost meanwhile."""
    client = link.client
    if landing is None or client is None:
        return None
    return PushLanding(
        request_id=request_id,
        engine_id=client.hello.engine_id,
        host=client.hello.host,
        port=client.hello.port,
        block_ids=tuple(block_ids),
        block_size=block_size,
        num_tokens=num_tokens,
        first_block=first_block,
        num_blocks=first_block + len(block_ids),
        landing_id=landing.landing_id,
        token=landing.token,
        epoch=landing.epoch,
    )
