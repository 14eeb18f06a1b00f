"""In which order a contract's legs run."""

from __future__ import annotations

import enum


class Order(enum.Enum):
    PREFILL_FIRST = enum.auto()  # the prefiller's answer says where the KV is
    TOGETHER = enum.auto()  # both legs at once, under a rendezvous the proxy made
    DECODE_FIRST = enum.auto()  # the decoder asks for its prefill, by the metaserver
