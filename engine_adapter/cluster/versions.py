"""Which connector, module, argument, environment variable and key belongs to which version: one table, read by
`engine_version`.

Sources: vllm-ascend at its tags v0.9.1 to v0.25.1rc1 (`distributed/`, `envs.py`, `ascend_config.py`), vLLM at 0.9.1 to
0.32 (`config/kv_transfer.py`, `envs.py`), and for arguments what 0.32 takes and vLLM's pull requests 21739, 29326 and
29402. A vllm-ascend version runs on the vLLM of the same number, so what is said of vLLM holds for it, too. A release
candidate counts as its release.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Version = tuple[int, int, int]

ALWAYS: Version = (0, 0, 0)
NEVER: Version = (9999, 0, 0)

KNOWN: dict[str, tuple[Version, Version]] = {
    "vllm-ascend": ((0, 9, 1), (0, 27, 0)),
    "vllm": ((0, 9, 1), (0, 33, 0)),
    "torch": (ALWAYS, NEVER),
}
"""From (in) and until (out) which versions of an engine a plan can be made for."""


def version_of(text: str) -> Version:
    """`0.11.0rc1` is (0, 11, 0)."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"rc|\.post", text)[0])]
    return (*numbers, 0, 0, 0)[:3]  # type: ignore[return-value]


def text_of(version: Version) -> str:
    return ".".join(str(part) for part in version)


@dataclass(frozen=True, slots=True)
class Span:
    """`since` is in, `until` is out."""

    since: Version = ALWAYS
    until: Version = NEVER

    def __contains__(self, version: Version) -> bool:
        return self.since <= version < self.until

    def __str__(self) -> str:
        if self.since >= self.until:
            return "no version"
        since = f"from {text_of(self.since)}" if self.since != ALWAYS else ""
        until = f"before {text_of(self.until)}" if self.until != NEVER else ""
        return f"versions {since}{' and ' if since and until else ''}{until}" if since or until else "every version"


@dataclass(frozen=True, slots=True)
class ConnectorSpan:
    """A connector in some versions of an engine."""

    engine: str
    name: str
    span: Span
    module: str
    registered: bool = True
    """Found by its name; otherwise only by kv_connector_module_path."""
    store: bool = False
    """A prefix store, not a hand-off."""


_ASCEND = "vllm_ascend.distributed."
_STOCK = "vllm.distributed.kv_transfer.kv_connector.v1."
_P2P = _ASCEND + "kv_transfer.kv_p2p."

CONNECTORS: tuple[ConnectorSpan, ...] = (
    *(
        ConnectorSpan("vllm-ascend", "LLMDataDistCMgrConnector", span, _ASCEND + "llmdatadist_c_mgr_connector")
        for span in (Span(until=(0, 9, 2)), Span((0, 10, 0), (0, 12, 0)))
    ),
    ConnectorSpan("vllm-ascend", "MooncakeConnectorV1", Span((0, 10, 1), (0, 14, 0)), _ASCEND + "mooncake_connector"),
    ConnectorSpan("vllm-ascend", "MooncakeConnectorV1", Span((0, 14, 0)), _P2P + "mooncake_connector"),
    ConnectorSpan(
        "vllm-ascend", "MooncakeConnector", Span((0, 10, 1), (0, 14, 0)), _ASCEND + "mooncake_connector", False
    ),
    ConnectorSpan("vllm-ascend", "MooncakeConnector", Span((0, 14, 0)), _P2P + "mooncake_connector", False),
    ConnectorSpan(
        "vllm-ascend",
        "MooncakeLayerwiseConnector",
        Span((0, 11, 0), (0, 14, 0)),
        _ASCEND + "mooncake_layerwise_connector",
    ),
    ConnectorSpan("vllm-ascend", "MooncakeLayerwiseConnector", Span((0, 14, 0)), _P2P + "mooncake_layerwise_connector"),
    ConnectorSpan("vllm", "NixlConnector", Span(), _STOCK + "nixl_connector"),
    ConnectorSpan("vllm", "MooncakeConnector", Span((0, 18, 0)), _STOCK + "mooncake.mooncake_connector"),
    ConnectorSpan("vllm-ascend", "BatonConnector", Span((0, 11, 0)), "engine_adapter.vllm_connector", False),
    ConnectorSpan("vllm", "BatonConnector", Span((0, 11, 0)), "engine_adapter.vllm_connector", False),
    ConnectorSpan("torch", "BatonConnector", Span(), "engine_adapter.torch_engine"),
    ConnectorSpan(
        "vllm-ascend", "UCMConnector", Span((0, 9, 1)), "ucm.integration.vllm.ucm_connector", False, store=True
    ),
    ConnectorSpan("vllm", "UCMConnector", Span((0, 9, 1)), "ucm.integration.vllm.ucm_connector", False, store=True),
)


def connector(engine: str, name: str, version: Version) -> ConnectorSpan | None:
    spans = (entry for entry in CONNECTORS if (entry.engine, entry.name) == (engine, name) and version in entry.span)
    return next(spans, None)


def connector_names(engine: str, version: Version) -> list[str]:
    """Of those that hand KV over."""
    known = (entry for entry in CONNECTORS if entry.engine == engine and not entry.store)
    return sorted({entry.name for entry in known if version in entry.span})


NameKind = Literal["argument", "environment", "kv-transfer-config", "additional-config"]


@dataclass(frozen=True, slots=True)
class NameSpan:
    """A name that is not in every version. Names that are not here are taken as they are."""

    kind: NameKind
    name: str
    """Of a key within a key: `outer.inner`."""
    span: Span
    instead: str
    """What to do in the other versions."""
    engines: tuple[str, ...] = ("vllm-ascend", "vllm")


_ASCEND_ONLY = ("vllm-ascend",)
_LEAVE = "leave it out"

NAMES: tuple[NameSpan, ...] = (
    NameSpan("argument", "disable-log-requests", Span(until=(0, 12, 0)), "leave it out: it is what they do unasked"),
    NameSpan("argument", "enable-log-requests", Span((0, 10, 1)), "leave it out: requests are logged unasked"),
    NameSpan("argument", "swap-space", Span(until=(0, 18, 0)), _LEAVE),
    NameSpan("argument", "task", Span(until=(0, 13, 0)), "write runner, and convert where it is no generation"),
    NameSpan("argument", "guided-decoding-backend", Span(until=(0, 12, 0)), "write structured-outputs-config"),
    NameSpan("argument", "enable-reasoning", Span(until=(0, 10, 0)), "leave it out: reasoning-parser is enough"),
    NameSpan("environment", "VLLM_USE_V1", Span(until=(0, 12, 0)), "leave it out: there is nothing but V1 any more"),
    NameSpan(
        "environment",
        "VLLM_LLMDD_RPC_PORT",
        Span(until=(0, 10, 1)),
        "leave it out: it is computed (VLLM_ASCEND_LLMDD_RPC_PORT)",
    ),
    NameSpan(
        "environment",
        "VLLM_ASCEND_LLMDD_RPC_PORT",
        Span((0, 10, 1), (0, 12, 0)),
        "leave it out: it is computed (VLLM_LLMDD_RPC_PORT before 0.10.1)",
    ),
    NameSpan(
        "environment",
        "VLLM_LLMDD_ABORT_REQUEST_TIMEOUT",
        Span(until=(0, 10, 0)),
        "write VLLM_NIXL_ABORT_REQUEST_TIMEOUT",
    ),
    NameSpan(
        "environment",
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT",
        Span((0, 11, 0), (0, 18, 0)),
        "write VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT",
        _ASCEND_ONLY,
    ),
    NameSpan(
        "environment",
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT",
        Span((0, 11, 0), (0, 23, 0)),
        "write kv_lease_duration into connector.extra",
        ("vllm",),
    ),
    NameSpan(
        "environment",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT",
        Span((0, 18, 0)),
        "write VLLM_NIXL_ABORT_REQUEST_TIMEOUT",
        _ASCEND_ONLY,
    ),
    NameSpan("environment", "VLLM_ASCEND_ENABLE_MLAPO", Span((0, 11, 0)), _LEAVE, _ASCEND_ONLY),
    *(
        NameSpan("kv-transfer-config", name, Span(until=(0, 32, 0)), "leave it out: vLLM refuses unknown keys")
        for name in ("kv_parallel_size", "kv_rank", "kv_buffer_size", "kv_ip")
    ),
    NameSpan("kv-transfer-config", "kv_load_failure_policy", Span((0, 13, 0)), _LEAVE),
    *(
        NameSpan("additional-config", name, span, instead, _ASCEND_ONLY)
        for name, span, instead in (
            ("torchair_graph_config", Span(until=(0, 12, 0)), _LEAVE),
            (
                "torchair_graph_config.enable_multistream_moe",
                Span(until=(0, 11, 0)),
                "write multistream_overlap_shared_expert beside torchair_graph_config",
            ),
            ("torchair_graph_config.enable_multistream_shared_expert", Span(NEVER, NEVER), _LEAVE),
            ("ascend_scheduler_config", Span(until=(0, 12, 0)), _LEAVE),
            ("chunked_prefill_for_mla", Span((0, 9, 2), (0, 13, 0)), _LEAVE),
            ("enable_weight_nz_layout", Span(until=(0, 9, 2)), _LEAVE),
            ("enable_prefill_optimizations", Span(until=(0, 9, 2)), _LEAVE),
            ("enable_shared_expert_dp", Span((0, 10, 1)), _LEAVE),
            ("multistream_overlap_shared_expert", Span((0, 11, 0)), _LEAVE),
            ("recompute_scheduler_enable", Span((0, 11, 0)), _LEAVE),
            ("lm_head_tensor_parallel_size", Span(NEVER, NEVER), "write lmhead_tensor_parallel_size"),
            (
                "lmhead_tensor_parallel_size",
                Span((0, 10, 1), (0, 12, 0)),
                "write finegrained_tp_config = { lmhead_tensor_parallel_size = ... }",
            ),
            ("finegrained_tp_config", Span((0, 12, 0)), _LEAVE),
        )
    ),
)
"""Unknown keys of additional-config are ignored without a word: a setting that does nothing is a mistake, too."""


def misplaced(kind: NameKind, name: str, engine: str, version: Version) -> NameSpan | None:
    """The table's entry for a name which this version does not know, or None if it does or may."""
    entries = [entry for entry in NAMES if (entry.kind, entry.name) == (kind, name) and engine in entry.engines]
    return entries[0] if entries and not any(version in entry.span for entry in entries) else None


def belongs(kind: NameKind, name: str, engine: str, version: Version) -> bool:
    return misplaced(kind, name, engine, version) is None


def llmdatadist_port_variable(version: Version) -> str:
    return "VLLM_LLMDD_RPC_PORT" if version < (0, 10, 1) else "VLLM_ASCEND_LLMDD_RPC_PORT"
