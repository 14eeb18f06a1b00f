"""Blocks of our pool that wait for producers: the push direction as this sidecar, which alone writes here, sees it.

A producer that knows a landing's token names a lease that is still computed; it is pulled as it is computed. A lost
producer's pull ends like any other, and the landing waits for the next until its time is over.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from sidecar.config import SidecarConfig
from sidecar.errors import OfferRefused, Refusal
from sidecar.landing import TRANSITIONS, Happening, State
from sidecar.metrics import SidecarMetrics
from sidecar.protocol import Land, Landing, Pull, PullEnded, PullSource
from sidecar.transfer_table import TransferTable

logger = logging.getLogger(__name__)

MAX_SOURCES = 8
"""Producers of one landing: each retry of its prefill is one."""
MAX_REMEMBERED = 4096
"""Ended landings that can still be told from unknown ones."""


class OpenLanding:
    """One landing; `sources` are the producers that have come and not been lost, the latest last."""

    def __init__(self, request: Land, landing_id: str, token: str, ends_at: float) -> None:
        self.request = request
        self.landing_id = landing_id
        self.token = token
        self.ends_at = ends_at
        self.state = State.WAITING
        self.sources: list[PullSource] = []
        self.filling: PullSource | None = None
        self.unwanted = False
        self.last_failure = ""
        self.timer: asyncio.TimerHandle | None = None

    def step(self, happening: Happening) -> None:
        """Raises Refusal on a step that the table does not have."""
        state = TRANSITIONS.get((self.state, happening))
        if state is None:
            raise Refusal("released", f"landing {self.landing_id!r} is {self.state}: no {happening} possible")
        self.state = state


class Landings:
    """Every landing of one registered engine. `pull_ended` stands between the pulls and the engine."""

    def __init__(
        self,
        config: SidecarConfig,
        epoch: str,
        num_blocks: int,
        metrics: SidecarMetrics,
        report: Callable[[PullEnded], None],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._num_blocks = num_blocks
        self._metrics = metrics
        self._report = report
        self._landings: dict[str, OpenLanding] = {}
        self._of_pull: dict[str, OpenLanding] = {}
        self._remembered: OrderedDict[str, None] = OrderedDict()
        self._loop = asyncio.get_running_loop()
        self._closing = ""
        self.pulls: TransferTable

    def __len__(self) -> int:
        return len(self._landings)

    def land(self, request: Land) -> Landing:
        """Keep the engine's blocks for whoever has the token. Raises OfferRefused."""
        local = request.local_block_ids
        if local and max(local) >= self._num_blocks:
            raise OfferRefused(f"block {max(local)} is not in the pool of {self._num_blocks} blocks")
        if request.pull_id in self._of_pull or self._closing:
            raise OfferRefused(self._closing or f"pull {request.pull_id!r} is open already")
        if len(self._landings) >= self._config.max_pulls:
            raise OfferRefused(f"{self._config.max_pulls} landings are open, which is the limit")
        ends_at = self._loop.time() + request.deadline_s
        landing = OpenLanding(request, secrets.token_hex(8), secrets.token_hex(16), ends_at)
        landing.timer = self._loop.call_at(ends_at, self._expire, landing)
        self._landings[landing.landing_id] = self._of_pull[request.pull_id] = landing
        expires_at = time.time() + request.deadline_s
        return Landing(request.call_id, landing.landing_id, landing.token, self._epoch, expires_at)

    def deliver(self, landing_id: str, token: str, source: PullSource) -> None:
        """A producer has begun to compute for the landing; the latest takes over. Raises Refusal."""
        landing = self._landings.get(landing_id)
        if landing is None:
            if landing_id in self._remembered:
                raise Refusal("released", f"landing {landing_id!r} has ended")
            raise Refusal("unknown", f"no landing {landing_id!r} here")
        if not hmac.compare_digest(landing.token.encode(), token.encode(errors="replace")):
            raise Refusal("wrong_token", f"the token is not that of landing {landing_id!r}")
        if landing.unwanted or self._closing:
            raise Refusal("released", f"landing {landing_id!r} is given up")
        wanted = landing.request.first_block + len(landing.request.local_block_ids)
        if source.num_blocks != wanted:
            raise Refusal("invalid", f"{source.num_blocks} blocks come, the landing is for {wanted}")
        if any(known.transfer_id == source.transfer_id for known in landing.sources):
            return
        if len(landing.sources) >= MAX_SOURCES:
            raise Refusal("invalid", f"{MAX_SOURCES} producers came for landing {landing_id!r}, which is the limit")
        landing.step(Happening.DELIVERED)
        landing.sources.append(source)
        if landing.filling is None:
            self._fill(landing)
        else:
            self.pulls.supersede(landing.request.pull_id)

    def abandon(self, pull_id: str) -> bool:
        """Nobody wants it any more; False if `pull_id` is no landing's."""
        landing = self._of_pull.get(pull_id)
        if landing is None:
            return False
        landing.unwanted = True
        if landing.filling is not None:
            self.pulls.abandon(pull_id)
        else:
            self._give_up(landing, "abandoned", "the engine abandoned it")
        return True

    def pull_ended(self, ended: PullEnded) -> None:
        """A pull has ended: a landing's producer is through or lost, any other is the engine's."""
        landing = self._of_pull.get(ended.pull_id)
        if landing is None or landing.filling is None:
            self._report(ended)
            return
        lost, landing.filling = landing.filling, None
        over = ended.ok or landing.unwanted or bool(self._closing) or self._loop.time() >= landing.ends_at
        superseded = ended.reason == "abandoned" and landing.sources[-1] is not lost
        if over or not superseded:
            landing.sources.remove(lost)
        if over:
            landing.step(Happening.PULL_ENDED)
            self._end(landing, ended)
            return
        landing.step(Happening.PULL_FAILED)
        landing.last_failure = f"{ended.reason}: {ended.message}"
        logger.info("landing_source_lost landing_id=%s reason=%s", landing.landing_id, ended.reason)
        if landing.sources:
            landing.step(Happening.DELIVERED)
            # Not from within the end of the pull before, whose id it takes over.
            self._loop.call_soon(self._fill, landing)

    def close(self, why: str) -> None:
        """The engine is gone: no producer is let in any more, and what waits ends now."""
        self._closing = self._closing or why
        for landing in list(self._landings.values()):
            if landing.filling is None:
                self._give_up(landing, "abandoned", why)

    def _fill(self, landing: OpenLanding) -> None:
        if landing.state is not State.FILLING or landing.filling is not None:
            return
        landing.filling = landing.sources[-1]
        request = landing.request
        left_s = max(0.0, landing.ends_at - self._loop.time())
        self.pulls.begin(
            Pull(request.pull_id, (landing.filling,), request.local_block_ids, request.first_block, left_s)
        )

    def _expire(self, landing: OpenLanding) -> None:
        """A pull that runs ends by its own deadline, which is the same."""
        if landing.filling is None and landing.landing_id in self._landings:
            why = f"nobody filled it within {landing.request.deadline_s:g} s"
            self._give_up(landing, "timeout", f"{why} ({landing.last_failure})" if landing.last_failure else why)

    def _give_up(self, landing: OpenLanding, reason: str, message: str) -> None:
        if landing.state is State.FILLING:  # about to be, by a source that is left
            landing.step(Happening.PULL_ENDED)
        else:
            landing.step(Happening.GIVEN_UP)
        self._end(landing, PullEnded(landing.request.pull_id, False, reason, message, 0, 0, 0.0, "", ""))

    def _end(self, landing: OpenLanding, ended: PullEnded) -> None:
        if landing.timer is not None:
            landing.timer.cancel()
        del self._landings[landing.landing_id], self._of_pull[landing.request.pull_id]
        self._remembered[landing.landing_id] = None
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        for source in landing.sources:
            self.pulls.drop(source)
        self._metrics.landing_ended(ended.reason or "ok")
        self._report(ended)
