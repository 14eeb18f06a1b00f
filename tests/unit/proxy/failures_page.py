"""`docs/failures.md`, made from `retry.TABLE`: `python -m tests.unit.proxy.failures_page > docs/failures.md`."""

from __future__ import annotations

from proxy.errors import Failure
from proxy.retry import TABLE, Action, Evidence, Leg

WHAT = {
    Failure.REFUSED: "The connection is refused",
    Failure.CONNECT_TIMEOUT: "No connection within `--connect-timeout-s`, or the host cannot be reached",
    Failure.STALE: "A kept connection turns out to be closed (a restarted engine, mostly)",
    Failure.RESET: "The connection ends before the answer is whole, or before the first event of a stream",
    Failure.TIMEOUT: "No answer within `--prefill-timeout-s`; no first event within `--first-token-timeout-s`, "
    "a prefill it waits for not counted",
    Failure.INSTANCE_OUT: "Silence, and the probes have taken the instance out meanwhile",
    Failure.GARBAGE: "What comes is not HTTP, or not what the contract promises",
    Failure.CLIENT_ERROR: "4xx, as a status or as the first event",
    Failure.SERVER_ERROR: "5xx",
    Failure.ERROR_EVENT: "200, and the first event is an error",
    Failure.LOST_MID_ANSWER: "The connection ends in mid-stream",
    Failure.SILENT_MID_ANSWER: "Silence in mid-stream for `--between-tokens-timeout-s`, or of an instance that is out",
    Failure.GARBAGE_MID_ANSWER: "What comes in mid-stream is not HTTP",
    Failure.OUT_OF_TIME: "The request's own limit, `--total-timeout-s`",
}
THEN = {
    Action.SAME_INSTANCE: "again at once, on a fresh connection",
    Action.OTHER_PREFILLER: "another prefiller",
    Action.OTHER_DECODER: "another decoder, with the KV there is",
    Action.PREFILL_AGAIN: "the KV is given back; prefill again, another decoder",
    Action.PASS_ON: "the instance's own answer goes to the client",
    Action.CONTINUE: "the client has the beginning: another decoder goes on; where that is not exact, an error event",
    Action.END_ANSWER: "the client has the beginning: an error event, and no `[DONE]`",
    Action.FAIL: "an error",
}
COUNTS = {
    Evidence.NONE: "no",
    Evidence.CONNECTION: "`--health-max-failures` in a row take it out",
    Evidence.REQUEST: "`--health-max-request-failures` different requests in a row take it out",
}
OPENING = """\
# What follows from a failure

Made from the table in `proxy/retry.py`; a test holds both equal, and `tests/proxy_blackbox/test_fault_table.py` has a
test for every cell. A leg is tried at most `--max-retries` times, with `--retry-delay` seconds before the first retry,
doubled for each next. When attempts run out, the client gets the instance's own error answer, or where there is none an
error with the status of the row. Until the first event of a stream has come, a retry is invisible to the client.
With `--keepalive-interval` a stream that waits for it has its 200 early, and what fails for good is then an error event
in the stream, in the form of the API that was called.
"""
CLOSING = """
## When an instance is out

- It is asked for `GET /health` every `--health-interval-s`. `--health-max-failures` probes or connections that fail in
  a row take it out; while it is out it is asked every `--health-retry-interval-s`, and the first answer brings it back.
- An instance that can be reached may still fail: `--health-max-request-failures` different requests in a row that end
  in 5xx, a reset, silence or garbage before a first event take it out too. Retries of one request count once, and what
  is about KV (`kv_load_error`) does not count at all. Answered probes do not bring it back then: after a back-off of
  1 s, doubled up to 30 s, one request is let in as a trial, and its success does. Where `--health-max-failures` probes
  in a row fail meanwhile, what answers afterwards is taken for another process, and a probe does bring it back.
- Where a probe of an instance that is out runs into `--health-timeout-s`, all who wait on it and have had no byte since
  the probe began are told at once (`instance_out`, `silent_mid_answer`): a stopped process keeps its connections.
  If any connection to it has brought a byte meanwhile, the instance is busy and alive: the probe does not count. A
  refused connection ends nothing that is open, since an engine that shuts down refuses and finishes its work.
- Out is not disabled: `enabled` is the operator's word (`/instances/remove`), `healthy` is evidence. If all enabled
  instances of a role are out, the one whose back-off ends first is asked all the same.
"""


def rendered() -> str:
    lines = [OPENING]
    for leg in Leg:
        lines += [f"## {leg.value.capitalize()}", "", "| Failure | What happened | Then | Status | Evidence |"]
        lines.append("|---|---|---|---|---|")
        for failure in Failure:
            row = TABLE[leg, failure]
            cells = f"`{failure.value}`", WHAT[failure], THEN[row.action], str(row.status), COUNTS[row.evidence]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n" + CLOSING


if __name__ == "__main__":
    print(rendered(), end="")
