"""How an engine speaks to its sidecar: blocking calls, a reader thread, completions as events.

Thread-safe; the standard library and msgspec are all it needs, because it is loaded inside engines. A pull that
returned normally is followed by exactly one PullEnded from `poll`, whatever happens, after writing has stopped.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from sidecar import protocol
from sidecar.calls import Calls
from sidecar.direct import DirectReads
from sidecar.errors import FrameError, LayoutRefused, OfferRefused, SidecarError, SidecarUnavailable
from sidecar.framing import FrameDecoder, encode_frame
from sidecar.greeting import greet
from sidecar.incoming import Incoming
from sidecar.layout import KvLayout
from sidecar.peer_process import PeerProcess
from sidecar.protocol import (
    Event,
    Landing,
    Message,
    Offer,
    OfferEnded,
    PoolRegistered,
    PullEnded,
    PullSource,
    SidecarHello,
    StoreEvent,
    StoreRequest,
    decode,
    encode,
)  # fmt: skip
from sidecar.store.messages import OpenRequests

CALL_TIMEOUT_S = 5.0
"""One round trip over a unix socket; past this the sidecar hangs and its connection is given up."""
REGISTER_TIMEOUT_S = 120.0
"""The sidecar faults the whole pool in: about 0.3 s a GiB."""

_ERRORS = {"LayoutRefused": LayoutRefused, "OfferRefused": OfferRefused}
_M = TypeVar("_M", bound=Message)


class SidecarClient:
    """One connection to a sidecar; made by `connect`, dead for good once SidecarLost has been polled."""

    def __init__(
        self, sock: socket.socket, hello: SidecarHello, decoder: FrameDecoder, on_event: Callable[[], object] | None
    ) -> None:
        self.hello = hello
        self.staged_slots = 0
        """Of the pool that was joined, where that is a staging buffer."""
        self._sock = sock
        self._incoming = Incoming(sock, decoder)
        self._on_event = on_event
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._calls = Calls()
        self._pulls: dict[str, PullSource | None] = {}
        self._store_requests = OpenRequests()
        self._direct = DirectReads()
        self._events: deque[Event] = deque()
        self._broken = ""
        self._closed = False
        self._process = PeerProcess(sock)
        self._reader = threading.Thread(target=self._read, name="sidecar-client", daemon=True)
        self._reader.start()

    @classmethod
    def connect(
        cls, socket_path: str, *, on_event: Callable[[], object] | None = None, timeout_s: float = 10.0
    ) -> SidecarClient:
        """Connect and exchange hellos. `on_event` is called when `poll` has something: on the reader thread, and by
        `pull` on its caller's, where that has copied.

        Raises SidecarUnavailable, or its child VersionMismatch.
        """
        sock, hello, decoder = greet(socket_path, timeout_s)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CALL_TIMEOUT_S), 0))
        return cls(sock, hello, decoder, on_event)

    def register_pool(self, fd: int, layout: KvLayout, *, staged: bool = False, address: int = 0) -> str:
        """Hand the pool's memfd over, which stays ours too. Returns the registration's epoch.

        `staged`: it is a buffer that stands for the KV. `address`: where its first byte lies in this process, for as
        long as this client lives; small pulls from producers on this host are copied by `pull` itself then. A pool
        registered before is retired first: its leases are void and its pulls end. Raises LayoutRefused or
        SidecarUnavailable.
        """
        direct = bool(address) and self._direct.possible()
        epoch = self._register(lambda call_id: protocol.RegisterPool(call_id, layout, None, staged, direct), (fd,))
        if direct:
            self._direct.begin(address, layout)
        return epoch

    def register_memory(self, memory: protocol.PoolMemory, layout: KvLayout, *, staged: bool = False) -> str:
        """As register_pool, for a pool that has no descriptor. It must stay where it is while this client lives."""
        return self._register(lambda call_id: protocol.RegisterPool(call_id, layout, memory, staged))

    def join_pool(self) -> str:
        """Offer, revoke and drop for the pool that another process of this engine registered. Returns its epoch.

        Offers' ends are reported to that process. Raises OfferRefused while no pool is registered, SidecarUnavailable.
        """
        answer = self._call(lambda call_id: protocol.JoinPool(call_id), PoolRegistered)
        self.staged_slots = answer.staged_slots
        return answer.epoch

    def offer(self, request_id: str, block_ids: Sequence[int], num_tokens: int, ttl_s: float) -> Offer:
        """Lease blocks; OfferEnded follows once, unless SidecarLost comes first. Raises OfferRefused."""
        ids = list(block_ids)
        if ids and min(ids) < 0:
            raise OfferRefused(f"block {min(ids)} is not in the pool")
        return self._call(lambda call_id: protocol.OfferBlocks(call_id, request_id, ids, num_tokens, ttl_s), Offer)

    def push(
        self, request_id: str, block_ids: Sequence[int], num_tokens: int, ttl_s: float, target: protocol.PushTarget,
        ready: protocol.Ready, num_blocks: int = 0,
    ) -> Offer:  # fmt: skip
        """Like `offer`, of blocks that are still computed, to a landing elsewhere; `mark_ready` follows, and brings
        the blocks that `block_ids` lacks to be `num_blocks`."""
        ids = list(block_ids)
        return self._call(
            lambda id: protocol.PushBlocks(id, request_id, ids, num_tokens, ttl_s, ready, target, num_blocks), Offer
        )

    def mark_ready(self, transfer_id: str, ready: protocol.Ready, block_ids: Sequence[int] = ()) -> None:
        """More of a push lies in the pool. Sends, and waits for nothing. Raises SidecarUnavailable."""
        self._send(protocol.MarkReady(transfer_id, ready, tuple(block_ids)))

    def land(
        self, pull_id: str, local_block_ids: Sequence[int], *, first_block: int = 0, deadline_s: float = 30.0
    ) -> Landing | None:
        """Keep blocks for a producer that comes by itself; one PullEnded follows. None: the sidecar was lost meanwhile.

        Raises OfferRefused or SidecarUnavailable, without an event then, or ValueError on a pull_id in use."""
        self._open(pull_id, None)
        try:
            ids = list(local_block_ids)
            return self._call(lambda id: protocol.Land(id, pull_id, ids, first_block, deadline_s), Landing)
        except SidecarError:
            with self._lock:
                if self._pulls.pop(pull_id, self) is None:
                    raise
            return None

    def revoke(self, transfer_id: str) -> None:
        """Take an offer back; OfferEnded follows, unless it has ended already."""
        self._send(protocol.Revoke(transfer_id))

    def pull(
        self,
        pull_id: str,
        source: PullSource | Sequence[PullSource],
        local_block_ids: Sequence[int],
        *,
        first_block: int = 0,
        deadline_s: float = 30.0,
        stage_layers: Sequence[int] = (),
    ) -> None:
        """Fetch the lease's blocks from `first_block` on into `local_block_ids`; one PullEnded follows.

        A producer of several ranks gives one lease a rank, all of them go into `source`, see protocol.Pull.

        From a producer on this host up to direct.MAX_BYTES may be copied before this returns (see register_pool).

        Raises SidecarUnavailable, and then no event follows, or ValueError on a pull_id in use or a negative number.
        """
        ids = list(local_block_ids)
        if first_block < 0 or deadline_s < 0 or (ids and min(ids) < 0):
            raise ValueError("first_block, deadline_s and block ids cannot be negative")
        sources = (source,) if isinstance(source, PullSource) else tuple(source)
        if not sources:
            raise ValueError("there is no source to pull from")
        alone = len(sources) == 1 and not stage_layers and deadline_s > 0
        if alone and self._pull_here(pull_id, sources[0], ids, first_block):
            return
        payload = encode(protocol.Pull(pull_id, sources, ids, first_block, deadline_s, tuple(stage_layers)))
        self._open(pull_id, sources[0])
        try:
            self._send_payload(payload)
        except SidecarUnavailable:
            with self._lock:
                if self._pulls.pop(pull_id, None) is not None:
                    raise
            # The reader saw the end first and has reported this pull.

    def abandon(self, pull_id: str) -> None:
        """Nobody wants it any more; its PullEnded still follows. An ended pull is left alone."""
        self._send(protocol.Abandon(pull_id))

    def drop(self, source: PullSource) -> None:
        """Tell the producer that nobody will read this lease. Idempotent, answers nothing."""
        self._send(protocol.Drop(source))

    def ask_store(self, request: StoreRequest) -> None:
        """Look up, load or save blocks; one StoreFound, StoreLoadEnded or StoreSaveEnded follows. Or abandon a load.

        Raises SidecarUnavailable, and then no event follows, or ValueError on an id in use.
        """
        payload = encode(request)
        with self._lock:
            self._check_alive()
            self._store_requests.add(request)
        try:
            self._send_payload(payload)
        except SidecarUnavailable:
            with self._lock:
                if self._store_requests.end(request):
                    raise
            # The reader saw the end first and has reported this request.

    def poll(self) -> list[Event]:
        """Everything that has happened since the last call, in order."""
        events: list[Event] = []
        with contextlib.suppress(IndexError):
            while True:
                events.append(self._events.popleft())
        return events

    @property
    def unresponsive(self) -> bool:
        """True once a call or word of a read went unanswered; the connection's end has not been seen yet."""
        return bool(self._broken) or self._direct.is_unheard(CALL_TIMEOUT_S)

    def fence(self) -> None:
        """Kill the sidecar's process, so that it writes no more whatever state it is in; SidecarLost follows.

        For one that hangs: its supervisor starts another. Does nothing if the process can't be named from here (another
        pid namespace) or signalled.
        """
        self._process.kill()

    def close(self) -> None:
        """End the connection, which to the sidecar is the engine's death. No event follows. Idempotent."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._sock.close()
        self._process.close()
        self._direct.close()
        self._incoming.close()

    def _open(self, pull_id: str, source: PullSource | None) -> None:
        with self._lock:
            self._check_alive()
            if pull_id in self._pulls:
                raise ValueError(f"pull {pull_id!r} is open already")
            self._pulls[pull_id] = source

    def _pull_here(self, pull_id: str, source: PullSource, local: Sequence[int], first_block: int) -> bool:
        """Whether the blocks could be read here, without the sidecar, and the pull has ended. Raises as `pull`."""
        read = None if self._broken or pull_id in self._pulls else self._direct.read(source, local, first_block)
        if read is None:
            return False
        peer = f"{source.engine_id}@{source.host}:{source.port}"
        ended = PullEnded(pull_id, True, "", "", read.num_blocks, read.num_bytes, read.seconds, "shm", peer)
        with self._lock:
            self._check_alive()  # nobody polls what follows the sidecar's loss
            self._events.append(ended)
        self._notify()
        with contextlib.suppress(SidecarUnavailable):
            self._send(read)
        return True

    def _register(self, make: Callable[[int], Message], fds: tuple[int, ...] = ()) -> str:
        self._direct.close()
        return self._call(make, PoolRegistered, REGISTER_TIMEOUT_S, fds).epoch

    def _call(
        self,
        make: Callable[[int], Message],
        expected: type[_M],
        timeout_s: float = CALL_TIMEOUT_S,
        fds: tuple[int, ...] = (),
    ) -> _M:
        with self._lock:
            self._check_alive()
            call = self._calls.begin()
        try:
            self._send_payload(encode(make(call.call_id)), fds)
            if not call.done.wait(timeout_s):
                self._give_up(f"the sidecar did not answer within {timeout_s:g} s")
        finally:
            self._calls.end(call)
        answer = call.answer
        if isinstance(answer, protocol.CallFailed):
            raise _ERRORS.get(answer.kind, SidecarError)(answer.message)
        if not isinstance(answer, expected):
            raise SidecarUnavailable(self._broken or "the sidecar's connection ended")
        return answer

    def _send(self, message: Message) -> None:
        with self._lock:
            self._check_alive()
        self._send_payload(encode(message))

    def _send_payload(self, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        frame = encode_frame(payload)
        with self._send_lock:
            if self._broken:
                raise SidecarUnavailable(self._broken)
            try:
                sent = socket.send_fds(self._sock, [frame], fds) if fds else 0
                self._sock.sendall(memoryview(frame)[sent:])
            except OSError as error:
                message = f"sending to the sidecar failed: {error.strerror}"
                self._give_up(message)
                raise SidecarUnavailable(message) from error

    def _give_up(self, message: str) -> None:
        """Use the connection no more. Open pulls are NOT reported yet: a stopped sidecar may still write when it
        resumes. It reads the end of our stream then, or dies; both end in the reader seeing the end of its own."""
        with self._lock:
            self._broken = self._broken or message
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def _check_alive(self) -> None:
        if self._broken or self._closed:
            raise SidecarUnavailable(self._broken or "this client is closed")

    def _read(self) -> None:
        message = "the sidecar closed the connection"
        try:
            while (frames := self._incoming.frames()) is not None:
                notable = False
                for frame in frames:
                    notable |= self._take(decode(protocol.to_engine, frame))
                if notable:
                    self._notify()
        except OSError as error:
            message = f"the connection to the sidecar broke: {error.strerror}"
        except FrameError as error:
            message = f"the sidecar speaks nonsense: {error}"
            self._give_up(message)
            with contextlib.suppress(OSError):
                self._incoming.await_end()  # until then it may write
        self._lose(message)

    def _take(self, message: Message) -> bool:
        """Hand one message to its caller or to `poll`; whether it went to `poll`."""
        if isinstance(message, OfferEnded):
            self._events.append(message)
            return True
        if isinstance(message, PullEnded):
            with self._lock:
                asked = self._pulls.pop(message.pull_id, self) is not self
            if asked:
                self._events.append(message)
            return asked
        if isinstance(message, StoreEvent):
            with self._lock:
                asked = self._store_requests.end(message)
            if asked:
                self._events.append(message)
            return asked
        if isinstance(message, protocol.PoolOpened):
            if fds := self._incoming.take_fds(2):
                self._direct.opened(message, fds)
        elif isinstance(message, protocol.PoolClosed):
            self._direct.closed(message)
        elif isinstance(message, protocol.ReadHeard):
            self._direct.heard()
        if isinstance(message, PoolRegistered | Offer | Landing | protocol.CallFailed):
            self._calls.answered(message)
        return False

    def _lose(self, message: str) -> None:
        """The sidecar, and with it every mapping of our pool, is gone: report what was open, wake who waits."""
        with self._lock:
            self._broken = self._broken or message
            pulls, self._pulls = self._pulls, {}
            store_events = self._store_requests.lose(message)
            closed = self._closed
        self._calls.lose()
        if closed:
            return
        for pull_id, source in pulls.items():
            peer = f"{source.engine_id}@{source.host}:{source.port}" if source else ""
            self._events.append(PullEnded(pull_id, False, "sidecar_lost", message, 0, 0, 0.0, "", peer))
        self._events.extend(store_events)
        self._events.append(protocol.SidecarLost(message))
        self._notify()

    def _notify(self) -> None:
        if self._on_event is not None:
            self._on_event()
