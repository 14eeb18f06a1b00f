"""What a deployment says that its engine's version does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engine_adapter.cluster.allocation import Conflict
from engine_adapter.cluster.deployment import Deployment
from engine_adapter.cluster.versions import (
    KNOWN,
    NameKind,
    connector,
    connector_names,
    misplaced,
    text_of,
    version_of,
)


def version_conflicts(deployment: Deployment) -> Iterator[Conflict]:
    engine, name = deployment.engine, deployment.connector.name
    version = version_of(engine.engine_version)
    since, until = KNOWN[engine.kind]
    if not since <= version < until:
        reason = f"plans are made for {engine.kind} from {text_of(since)} and before {text_of(until)}"
        yield Conflict("engine.engine_version", engine.engine_version, reason, "give a version of these")
        return
    if connector(engine.kind, name, version) is None or name == "UCMConnector":
        reason = f"{engine.kind} {engine.engine_version} has no connector of this name that hands KV over"
        yield Conflict(
            "connector.name", name, reason, f"it has {', '.join(connector_names(engine.kind, version)) or 'none'}"
        )
    for key, kind, known_as, value in _names(deployment):
        entry = misplaced(kind, known_as, engine.kind, version)
        if entry is not None:
            reason = f"{engine.kind} {engine.engine_version} does not know it, but {entry.span}"
            yield Conflict(key, str(value), reason.replace(", but no version", ", as no version does"), entry.instead)


def _names(deployment: Deployment) -> Iterator[tuple[str, NameKind, str, object]]:
    """(key in the file, kind, the name, its value) of all that the table may know."""
    for place, section in deployment.engine_sections():
        for name, said in section.env.items():
            yield f"{place}.env.{name}", "environment", name, said
        for flag, value in section.args.items():
            yield f"{place}.args.{flag}", "argument", flag.strip("-").replace("_", "-"), value
            if flag.strip("-") == "additional-config" and isinstance(value, Mapping):
                for name, inner in _with_inner(value):
                    yield f"{place}.args.{flag}.{name}", "additional-config", name, inner
    for name, value in deployment.connector.config.items():
        yield f"connector.config.{name}", "kv-transfer-config", name, value


def _with_inner(table: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", said) for inner, said in value.items())
