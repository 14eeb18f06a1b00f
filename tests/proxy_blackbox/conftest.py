from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.proxy_blackbox.contracts import proxy_for
from tests.proxy_blackbox.harness import Engines, Proxy, settled


@pytest.fixture(scope="session")
def _common_fleet() -> Iterator[Engines]:
    """Two prefillers and two decoders, one process for all tests but those of a contract."""
    started = Engines(2, 2)
    yield started
    started.process.stop()


@pytest.fixture(scope="session")
def _common_proxy(_common_fleet: Engines) -> Iterator[Proxy]:
    started = Proxy(_common_fleet, "--health-retry-interval-s", "0.1", "--health-max-failures", "2")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def contract(request: pytest.FixtureRequest) -> str:
    """What a module's `CONTRACT` says: its engines and its proxy, with time-outs short, are its own then."""
    return str(getattr(request.module, "CONTRACT", ""))


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, contract: str) -> Iterator[Engines]:
    if not contract:
        yield request.getfixturevalue("_common_fleet")
        return
    started = Engines(2, 2, "--contract", contract, *getattr(request.module, "ENGINE_FLAGS", ()))
    yield started
    started.process.stop()


@pytest.fixture(scope="module")
def _shared_proxy(request: pytest.FixtureRequest, contract: str, fleet: Engines) -> Iterator[Proxy]:
    if not contract:
        yield request.getfixturevalue("_common_proxy")
        return
    started = proxy_for(fleet, contract)
    yield started
    started.stop()


@pytest.fixture
def engines(fleet: Engines) -> Engines:
    """Their faults and memories wiped."""
    fleet.reset()
    return fleet


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
