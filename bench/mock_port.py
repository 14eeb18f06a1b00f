"""A port that stays a mock engine's own while the engine is stopped."""

from __future__ import annotations

import random
import socket

# Where no system puts those that ask for any port: nobody calls here who has not noticed that another process is gone.
PORTS = range(20_000, 32_768)


class Port:
    """Claimed by a socket that is bound and never listens: who connects is refused, and nobody is given it."""

    def __init__(self, host: str, number: int) -> None:
        """Any free one if `number` is 0."""
        self.host = host
        self.number = number
        self._claim = self.bound() if number else self._bound_to_any()
        self.number = self._claim.getsockname()[1]

    def bound(self) -> socket.socket:
        """One more socket bound to it, to listen."""
        one = self._socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((self.host, self.number))
        except OSError:
            one.close()
            raise
        return one

    def close(self) -> None:
        self._claim.close()

    def _socket(self) -> socket.socket:
        return socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)

    def _bound_to_any(self) -> socket.socket:
        one = self._socket()
        for number in (*random.sample(PORTS, 100), 0):
            try:
                one.bind((self.host, number))
                break
            except OSError:
                if not number:
                    one.close()
                    raise
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return one
