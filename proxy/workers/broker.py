"""The parent's side of the channels: questions go to those they are for, answers to those who asked.

A worker that dies is answered for; one that does not read is not written to without end.
"""

from __future__ import annotations

import logging
import selectors
from collections.abc import Iterator, Mapping

from proxy.workers.child import Child
from proxy.workers.frames import PARENT, Message, encode
from proxy.workers.metrics_sum import Kept

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
MAX_OUTGOING_BYTES = 32 << 20


class Broker:
    def __init__(self, children: Mapping[int, Child], selector: selectors.BaseSelector) -> None:
        self._children = children
        self._selector = selector
        self._kept = Kept()

    def exchange(self, child: Child, events: int) -> Iterator[Message]:
        """Read and write what can be. Yields what the worker tells the parent."""
        if events & selectors.EVENT_WRITE:
            self._flush(child)
        if not events & selectors.EVENT_READ:
            return
        while child.sock is not None:
            try:
                data = child.sock.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self._hang_up(child)  # it is dead or about to be: SIGCHLD says so
                return
            for message in child.decoder.feed(data):
                message.sender = child.number
                if message.kind == "tell":
                    if message.call == "totals":
                        self._kept.heard(child.number, message.body)
                    yield message
                elif message.kind == "ask":
                    self._ask(child, message)
                elif message.kind == "answer":
                    self._answer(child, message)

    def tell_all(self, message: Message) -> None:
        for child in self._children.values():
            self._send(child, message)

    def ended(self, child: Child) -> None:
        """What it had counted is kept, and whoever waits for it is told."""
        self._hang_up(child)
        self._kept.ended(child.number)
        for asker, number in child.owes:
            self._send(
                self._children[asker],
                Message("answer", "", number, child.number, None, f"worker {child.number} has ended"),
            )
        for other in self._children.values():
            other.owes = {one for one in other.owes if one[0] != child.number}

    def _ask(self, asker: Child, message: Message) -> None:
        wanted = message.to if message.to is not None else list(self._children)
        asked = [self._children[one] for one in wanted if one != asker.number and one in self._children]
        asked = [one for one in asked if one.sock is not None]
        kept = b""
        if message.call == "metrics":
            self._kept.heard(asker.number, message.body)
            kept = self._kept.dump()
            message.body = b""
        to = [one.number for one in asked]
        self._send(asker, Message("asked", message.call, message.id, PARENT, to, "", None, kept))
        for one in asked:
            one.owes.add((asker.number, message.id))
            self._send(one, message)

    def _answer(self, child: Child, message: Message) -> None:
        if message.call == "metrics" and not message.error:
            self._kept.heard(child.number, message.body)
        asker = message.to[0] if message.to else PARENT
        if (asker, message.id) in child.owes:
            child.owes.discard((asker, message.id))
            self._send(self._children[asker], message)

    def _send(self, child: Child, message: Message) -> None:
        if child.sock is None:
            return
        if len(child.outgoing) > MAX_OUTGOING_BYTES:
            log.error("event=worker_does_not_read worker=%d dropped=%s", child.number, message.call)
            return
        child.outgoing += encode(message)
        self._flush(child)

    def _flush(self, child: Child) -> None:
        if child.sock is None:
            return
        try:
            while child.outgoing:
                del child.outgoing[: child.sock.send(child.outgoing)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            child.outgoing.clear()  # it is gone; SIGCHLD says so
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if child.outgoing else 0)
        key = self._selector.get_key(child.sock)
        if key.events != events:
            self._selector.modify(child.sock, events, key.data)

    def _hang_up(self, child: Child) -> None:
        sock, child.sock = child.sock, None
        if sock is not None:
            self._selector.unregister(sock)
            sock.close()
