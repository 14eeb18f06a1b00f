"""The parent of the worker processes: it listens, forks, watches, and passes messages on. It serves no request.

It runs no event loop, so that a worker can be forked from it at any time: one process, one thread, one selector.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

import uvloop

from proxy.config import Address, ProxyConfig
from proxy.errors import StartError
from proxy.load_board import LoadBoard
from proxy.prefix_board import PrefixBoard
from proxy.workers.broker import Broker
from proxy.workers.child import Child
from proxy.workers.frames import Message
from proxy.workers.seat import Seat

log = logging.getLogger(__name__)

Serve = Callable[[Seat], Coroutine[Any, Any, None]]
END_GRACE_S = 10.0  # beyond --drain-timeout-s, until a worker that was told to end is killed
FIRST_BACK_OFF_S = 0.5
MAX_BACK_OFF_S = 30.0
STEADY_S = 10.0  # a worker that lived so long is replaced at once
_STOP = (signal.SIGTERM, signal.SIGINT)
_WATCHED = (*_STOP, signal.SIGHUP, signal.SIGCHLD)


class Supervisor:
    """`run()` until told to stop; returns the exit status. Raises StartError."""

    def __init__(self, config: ProxyConfig, listeners: list[socket.socket], serve: Serve) -> None:
        self._config = config
        self._listeners = listeners
        self._serve = serve
        self._board = LoadBoard(config.workers)
        self._prefixes = {role: PrefixBoard() for role in ("prefill", "decode")}
        self._selector = selectors.DefaultSelector()
        self._children = {number: Child(number) for number in range(config.workers)}
        self._broker = Broker(self._children, self._selector)
        self._woken, self._waker = socket.socketpair()
        self._is_up = False
        self._kill_at = 0.0
        """When those still alive are killed; 0 while nobody was told to stop."""
        self._status = 0

    def run(self) -> int:
        self._watch_signals()
        try:
            for child in self._children.values():
                self._start(child, replaces=False)
            while True:
                self._step()
                if self._kill_at and not any(child.pid for child in self._children.values()):
                    return self._status
        finally:
            self._end_all()

    def _watch_signals(self) -> None:
        for one in (self._woken, self._waker):
            one.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in _WATCHED:
            signal.signal(number, lambda *_: None)
        self._selector.register(self._woken, selectors.EVENT_READ, self._signalled)

    def _end_all(self) -> None:
        for child in self._children.values():
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
        self._board.close()
        for one in self._prefixes.values():
            one.close()

    # --- one turn

    def _step(self) -> None:
        for key, events in self._selector.select(self._wait_s()):
            key.data(events)
        now = monotonic()
        for child in self._children.values():
            if not child.pid and not self._kill_at and now >= child.start_at:
                self._start(child, replaces=True)
            if child.pid and self._kill_at and now >= self._kill_at:
                log.error("event=worker_killed worker=%d pid=%d reason='still there'", child.number, child.pid)
                os.kill(child.pid, signal.SIGKILL)

    def _wait_s(self) -> float | None:
        times = [child.start_at for child in self._children.values() if not child.pid and not self._kill_at]
        if self._kill_at:
            times.append(self._kill_at)
        return max(0.05, min(times) - monotonic()) if times else None

    def _signalled(self, _: int) -> None:
        for number in self._woken.recv(4096):
            if number in _STOP:
                self._stop()
            elif number == signal.SIGHUP:
                self._broker.tell_all(Message("tell", "reload"))
        self._reap()  # whatever it was: signals of one kind that come together may be told once

    # --- life and death

    def _start(self, child: Child, replaces: bool) -> None:
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # until it is clear whose signals they are
        pid = os.fork()
        if not pid:
            self._become(child, ours, theirs, replaces)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        theirs.close()
        child.began(pid, ours, monotonic())
        self._selector.register(ours, selectors.EVENT_READ, lambda events: self._talk(child, events))
        if replaces:
            log.warning("event=worker_started worker=%d pid=%d", child.number, pid)

    def _become(self, child: Child, ours: socket.socket, theirs: socket.socket, replaces: bool) -> None:
        """In the new process. What is the parent's is closed: the workers see its end when its sockets close."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGHUP):  # of a whole process group; the parent says what to do
                signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            for one in (ours, self._woken, self._waker, *(other.sock for other in self._children.values())):
                if one is not None:
                    one.close()
            self._selector.close()
            gc.freeze()
            row = self._board.row(child.number)
            seat = Seat(child.number, self._listeners, theirs, row, self._prefixes, replaces)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(seat))
            status = 0
        except StartError as error:
            if self._is_up:  # else the parent says it, once
                log.error("event=worker_failed worker=%d reason=%r", child.number, str(error))
        except Exception:
            log.exception("event=worker_failed worker=%d", child.number)
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
                sys.stdout.flush()
            os._exit(status)

    def _talk(self, child: Child, events: int) -> None:
        for message in self._broker.exchange(child, events):
            if message.call == "ready":
                child.is_ready = True
                if not self._is_up and all(one.is_ready for one in self._children.values()):
                    self._is_up = True
                    addresses = [Address(*one.getsockname()[:2]) for one in self._listeners]
                    print("ready", " ".join(f"listen={address}" for address in addresses), flush=True)
            elif message.call == "failed":
                child.reason = str(message.fields)

    def _reap(self) -> None:
        for child in self._children.values():
            while child.pid:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                if not pid:
                    break
                self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: Child, code: int) -> None:
        """A negative `code` is the signal that ended it."""
        lived_s = monotonic() - child.since
        for message in self._broker.exchange(child, selectors.EVENT_READ):  # its last words
            if message.call == "failed":
                child.reason = str(message.fields)
        pid, reason = child.pid, child.reason
        self._broker.ended(child)
        self._board.wipe(child.number)
        child.ended()
        if self._kill_at:
            self._status = self._status or (0 if code in (0, -signal.SIGTERM) else 1)
            return
        if not self._is_up:
            how = f"signal {-code}" if code < 0 else f"status {code}"
            raise StartError(reason or f"worker {child.number} ended at its start ({how})")
        child.back_off_s = (
            0.0 if lived_s > STEADY_S else min(max(FIRST_BACK_OFF_S, child.back_off_s * 2), MAX_BACK_OFF_S)
        )
        child.start_at = monotonic() + child.back_off_s
        log.error(
            "event=worker_ended worker=%d pid=%d status=%d lived_s=%.1f again_in_s=%.1f",
            child.number, pid, code, lived_s, child.back_off_s,
        )  # fmt: skip

    def _stop(self) -> None:
        """Told once: let them drain. Told again: end them."""
        if self._kill_at:
            self._status = 1
            self._kill_at = monotonic()
            return
        self._kill_at = monotonic() + self._config.drain_timeout_s + END_GRACE_S
        for listener in self._listeners:
            listener.close()
        for child in self._children.values():
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)
