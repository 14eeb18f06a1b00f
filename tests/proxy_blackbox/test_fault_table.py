"""The fault table, a test for every cell: {prefiller, decoder} x what happens to it x {whole, stream} x endpoint.

Each cell asserts what `retry.TABLE` promises for the failure that was seen: the status, on which instances the request
was tried, and that the client's text is right. The `steady` fixture then checks that loads, connections and the KV
ledgers of both sides are empty.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.errors import Failure
from proxy.retry import TABLE, Action, Leg
from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, Engines, Proxy, body_of, eventually, settled, text_for

TIMEOUT_S = {"hasty": "1", "patient": "10"}  # of legs; the latter where nothing hangs: no busy machine is in a cell
FLAGS = (
    *("--health-retry-interval-s", "0.05", "--policy", "round_robin"),  # so that each instance has its turn
    *("--health-max-failures", "1000", "--health-max-request-failures", "1000"),  # no cell is evidence in the next
)
MID = Failure.LOST_MID_ANSWER, Failure.SILENT_MID_ANSWER, Failure.GARBAGE_MID_ANSWER
DOWN = {"refused", "connect_timeout"}
HANGS = {"connect_timeout", "hang_before_head", "hang_mid"}
# What is done to an instance, and what the proxy may take it for where no byte has reached the client. A connection
# that is reused may have been closed by a healthy engine: STALE.
CAUSES: dict[str, tuple[Failure, ...]] = {
    "refused": (Failure.REFUSED,),
    "connect_timeout": (Failure.CONNECT_TIMEOUT,),
    "status_4xx": (Failure.CLIENT_ERROR,),
    "status_5xx": (Failure.SERVER_ERROR,),
    "hang_before_head": (Failure.TIMEOUT,),
    "reset_before_head": (Failure.RESET, Failure.STALE),
    "error_event": (Failure.ERROR_EVENT, Failure.SERVER_ERROR),  # the latter where nothing is streamed
    "reset_mid": (Failure.RESET,),
    "hang_mid": (Failure.TIMEOUT,),
    "garbage": (Failure.GARBAGE,),
    "garbage_mid": (Failure.GARBAGE,),
}
MID_CAUSES = dict(zip(("reset_mid", "hang_mid", "garbage_mid"), MID, strict=True))


@pytest.fixture(scope="module")
def _steady(fleet: Engines) -> Iterator[dict[str, Proxy]]:
    names = ("connect", "prefill", "first-token", "between-tokens")
    started = {
        kind: Proxy(fleet, *FLAGS, *(word for name in names for word in (f"--{name}-timeout-s", seconds)))
        for kind, seconds in TIMEOUT_S.items()
    }
    yield started
    for one in started.values():
        one.stop()


@pytest.fixture
def steady(_steady: dict[str, Proxy], engines: Engines, fault: str) -> Iterator[Proxy]:
    """A proxy that never takes an instance out; all are well before a test, and nothing is open after it."""
    proxy = _steady["hasty" if fault in HANGS else "patient"]
    eventually(lambda: [one for one in proxy.get("/instances").json["instances"] if not one["healthy"]], "not well")
    yield proxy
    settled(proxy, engines)


def failures_seen(proxy: Proxy) -> dict[tuple[str, str, str], int]:
    """The counter of failures: (leg, failure, action)."""
    lines = re.findall(rb"^pd_proxy_retries_total\{(.*)\} (\S+)$", proxy.get("/metrics").body, re.M)
    found = {}
    for labels, value in lines:
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels.decode()))
        found[named["leg"], named["failure"], named["action"]] = int(float(value))
    return found


def tried(engines: Engines, role: str) -> list[int]:
    """How many requests of the story each instance of a role has read."""
    counts = [one["counts"] for one in engines.state()["instances"] if one["role"] == role]
    return [one.get("requests", 0) - one.get("release_only", 0) for one in counts]


def break_one(engines: Engines, role: str, fault: str, number: int) -> None:
    """Make an instance of `role` that is down be the one of that number; another fault hits whoever is asked first."""
    ports: tuple[int, ...] = getattr(engines, role)
    if fault not in DOWN:
        if fault.startswith("status_"):
            engines.fault(role, "status", shared=True, status=422 if fault == "status_4xx" else 500)
        else:
            engines.fault(role, fault, shared=True)
        return
    for port in ports:
        engines.start(port)
    (engines.stop if fault == "refused" else engines.go_deaf)(ports[number])


class Outcome:
    """What one request met: the failure the proxy counted, what the client got, and who read the request."""

    def __init__(self, proxy: Proxy, engines: Engines, path: str, fields: dict[str, Any]) -> None:
        before, read = failures_seen(proxy), {role: tried(engines, role) for role in ("prefill", "decode")}
        self.status, self.text, self.told, self.done = 0, "", False, False
        try:
            answer = proxy.post(path, fields)
        except (http.client.IncompleteRead, ConnectionError):
            self.status, self.told = 200, True  # broken off: nobody takes it for whole
        else:
            self.status = answer.status
            if answer.status == 200:
                events = answer.events if fields.get("stream") else [answer.json]
                self.text, self.done = answer.text, events[-1] == "[DONE]" or not fields.get("stream")
                self.told = any(isinstance(one, dict) and "error" in one for one in events)
            else:
                self.told = bool(answer.error)
        settled(proxy, engines)  # what is given back is given back before it is counted
        after = failures_seen(proxy)
        self.failures = [key for key, number in after.items() for _ in range(number - before.get(key, 0))]
        self.read = {
            role: [now - was for now, was in zip(tried(engines, role), read[role], strict=True)] for role in read
        }


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", CAUSES)
@pytest.mark.parametrize("leg", list(Leg))
def test_cell(steady: Proxy, engines: Engines, leg: Leg, fault: str, stream: bool, path: str) -> None:
    fields = body_of(path, num_tokens=9, stream=stream, mock={"interval_s": 0.02})
    for number in (0, 0, 1, 1):  # one that is down is asked when it is its turn
        if number == 0 or fault in DOWN:
            break_one(engines, leg.value, fault, number)
        outcome = Outcome(steady, engines, path, fields)
        if outcome.failures:
            break
        assert fault in DOWN and (outcome.status, outcome.text) == (200, text_for(fields))
    assert outcome.failures, "the fault was not met"
    seen_leg, seen, action = outcome.failures[0]
    mid = leg is Leg.DECODE and stream and fault in MID_CAUSES
    assert seen_leg == leg.value
    assert Failure(seen) in ((MID_CAUSES[fault],) if mid else CAUSES[fault])
    row = TABLE[leg, Failure(seen)]
    if not mid:  # how a broken stream goes on is told by its end
        assert action == row.action.value and len(outcome.failures) == 1
    check_client(row.action, outcome, text_for(fields))
    check_places(row.action, outcome, fault)


def check_client(action: Action, outcome: Outcome, text: str) -> None:
    if action is Action.PASS_ON:
        assert outcome.status == 422 and outcome.told
    elif action is Action.END_ANSWER:  # told, never ended as if all were there; or continued, exactly
        assert outcome.status == 200 and text.startswith(outcome.text)
        assert outcome.told != (outcome.done and outcome.text == text)
    else:
        assert (outcome.status, outcome.text, outcome.done, outcome.told) == (200, text, True, False)


def check_places(action: Action, outcome: Outcome, fault: str) -> None:
    """Who read the request: one that is down never did."""
    prefills, decodes = sorted(outcome.read["prefill"]), sorted(outcome.read["decode"])
    elsewhere = [0, 1] if fault in DOWN else [1, 1]
    if action is Action.OTHER_PREFILLER:
        assert (prefills, decodes) == (elsewhere, [0, 1])
    elif action is Action.SAME_INSTANCE:
        assert (prefills, decodes) == ([0, 2], [0, 1])
    elif action is Action.OTHER_DECODER:
        assert (prefills, decodes) == ([0, 1], elsewhere), "with the KV there is"
    elif action is Action.PREFILL_AGAIN:
        assert sum(prefills) == 2 and (decodes == elsewhere or fault == "reset_before_head")
    elif action is Action.PASS_ON:
        assert sum(prefills) == 1 and sum(decodes) <= 1
