"""What each field of a request's head is to the proxy, by its name. Pure."""

from __future__ import annotations

MAX_KNOWN_NAMES = 1000

# Never passed on to an instance: hop-by-hop fields (RFC 9110 section 7.6.1), what we set ourselves, and
# Accept-Encoding, because an answer has to be looked into until its first event.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer upgrade "
    b"transfer-encoding".split()
)
# Never passed on either: by these, proxies tell engines and their connectors where KV comes from and who computes.
CONNECTOR_FIELDS = frozenset(
    b"x-data-parallel-rank x-data-parallel-host-port x-prefiller-host-port x-prefiller-url x-decoder-host-port "
    b"x-encoder-hosts-ports x-engine-id".split()
)
CONNECTOR_PREFIXES = (b"x-kv-", b"x-bootstrap-", b"x-disagg-", b"x-remote-")
# What a request field is to us, by its name as the client spells it: clients send the same few again and again.
(
    PASSED, NOT_PASSED, LENGTH, CODING, CONNECTION, HOST, EXPECT, REQUEST_ID, AUTHORIZATION, CONTENT_CODING,
    SERVER_TIMING,
    API_KEY, TRACEPARENT, TRACESTATE,
) = range(14)  # fmt: skip
KINDS = {
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"host": HOST,
    b"expect": EXPECT,
    b"accept-encoding": NOT_PASSED,
    b"x-request-id": REQUEST_ID,
    b"authorization": AUTHORIZATION,
    b"x-server-timing": SERVER_TIMING,
    b"x-api-key": API_KEY,
    b"content-encoding": CONTENT_CODING,
    b"traceparent": TRACEPARENT,
    b"tracestate": TRACESTATE,
}
KIND_OF: dict[bytes, int] = {}


def is_for_connectors(lower: bytes) -> bool:
    return lower in CONNECTOR_FIELDS or lower.startswith(CONNECTOR_PREFIXES)


def kind_of(name: bytes) -> int:
    lower = name.lower()
    kind = KINDS.get(lower, NOT_PASSED if lower in HOP_BY_HOP else PASSED)
    dashed = lower.replace(b"_", b"-")  # one name to servers that hand fields on as environment variables
    if is_for_connectors(dashed) or (dashed != lower and (dashed in HOP_BY_HOP or dashed in KINDS)):
        kind = NOT_PASSED
    if len(KIND_OF) < MAX_KNOWN_NAMES:
        KIND_OF[name] = kind
    return kind
