from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.proxy_blackbox.harness import Engines, Proxy, settled


@pytest.fixture(scope="session")
def fleet() -> Iterator[Engines]:
    """Two prefillers and two decoders, one process for all tests."""
    started = Engines(2, 2)
    yield started
    started.process.stop()


@pytest.fixture
def engines(fleet: Engines) -> Engines:
    """The same engines, their faults and memories wiped."""
    fleet.reset()
    return fleet


@pytest.fixture(scope="session")
def _shared_proxy(fleet: Engines) -> Iterator[Proxy]:
    started = Proxy(fleet, "--health-retry-interval-s", "0.1", "--health-max-failures", "2")
    yield started
    started.stop()


@pytest.fixture
def proxy(_shared_proxy: Proxy, engines: Engines) -> Iterator[Proxy]:
    """A proxy that many tests share; after each, it and the engines must have come to rest."""
    yield _shared_proxy
    settled(_shared_proxy, engines)


@pytest.fixture
def start_proxy(engines: Engines) -> Iterator[Callable[..., Proxy]]:
    """Proxies of a test's own: `start_proxy("--flag", "value")`. They too must be idle at the end, if still alive."""
    started: list[Proxy] = []

    def start(*flags: str, **environment: str) -> Proxy:
        started.append(Proxy(engines, *flags, **environment))
        return started[-1]

    yield start
    try:
        for one in started:
            if one.process.popen.poll() is None:
                settled(one, engines)
    finally:
        for one in started:
            one.stop()
