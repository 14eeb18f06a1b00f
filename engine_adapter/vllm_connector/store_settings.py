"""What `kv_connector_extra_config.store` may say, and the flags that the sidecars are started with for it. Pure."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from engine_adapter.vllm_connector.errors import ConnectorStartError

WHERE = "kv_connector_extra_config.store"
SIZES = ("dir_bytes", "memory_bytes", "mooncake_segment_bytes")
SHARED_OUT = ("memory_bytes", "mooncake_segment_bytes")
"""Of the whole engine: its ranks get equal parts."""


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Each field is a key. Sizes are bytes or text like "16GiB"; 0 or "" leaves a tier out, a size to the sidecar."""

    dir: str = ""
    """A directory that every engine of the same model may share."""
    dir_bytes: int = 0
    """Of everything in it, of all engines together."""
    memory_bytes: int = 0
    """Host memory of this engine."""
    mooncake: str = ""
    """HOST:PORT of a mooncake_master."""
    mooncake_segment_bytes: int = 0
    """Host memory that this engine gives to Mooncake Store."""
    load_timeout_s: float = 5.0
    """What has not come by then is computed."""


def store_from(kv_role: str, sidecar: str, asked: object) -> StoreSettings:
    """Check and read. Raises ConnectorStartError."""
    if not isinstance(asked, Mapping):
        raise ConnectorStartError(f'{WHERE} is {asked!r}; give a map such as {{"dir": "/mnt/shared/kv"}}')
    if kv_role == "kv_consumer":
        raise ConnectorStartError(
            f"{WHERE} is for engines that prefill, and kv_role is kv_consumer: give it to the prefillers"
        )
    fields = {field.name: field for field in dataclasses.fields(StoreSettings)}
    values: dict[str, Any] = {}
    for key, value in asked.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise ConnectorStartError(f"{WHERE}.{key} is not a key of the prefix store; {hint}")
        values[key] = _value(key, value, fields[key].default)
    store = StoreSettings(**values)
    _check(sidecar, store)
    return store


def sidecar_flags(store: StoreSettings, num_ranks: int) -> tuple[str, ...]:
    """For the sidecar of one of the engine's `num_ranks` ranks."""
    words: list[str] = []
    for field in dataclasses.fields(store):
        value = getattr(store, field.name)
        if value and field.name != "load_timeout_s":
            value = value // num_ranks if field.name in SHARED_OUT else value
            words += [f"--store-{field.name.replace('_', '-')}", str(value)]
    return tuple(words)


def _value(key: str, value: Any, default: Any) -> Any:
    wrong = isinstance(value, bool)
    if key in SIZES and not wrong:
        try:
            size = int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError as error:
            raise ConnectorStartError(f'{WHERE}.{key} is {value!r}; give bytes, or text like "16GiB"') from error
        if size <= 0:
            raise ConnectorStartError(f"{WHERE}.{key} is {value!r}; give more than 0, or leave it out")
        return size
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if wrong or not isinstance(value, wanted):
        raise ConnectorStartError(f"{WHERE}.{key} is {value!r}, it must be like {default!r}")
    return value


def _check(sidecar: str, store: StoreSettings) -> None:
    tiers = [key for key in ("dir", "memory_bytes", "mooncake") if getattr(store, key)]
    if sidecar != "auto" and (tiers or store.dir_bytes or store.mooncake_segment_bytes):
        raise ConnectorStartError(
            f"{WHERE} describes a store for a sidecar that runs already ({sidecar}): give pd-sidecar its --store-... "
            f"flags instead, and leave {WHERE} at {{}} so that it is used"
        )
    if sidecar == "auto" and not tiers:
        raise ConnectorStartError(f"{WHERE} names no tier: give dir, memory_bytes or mooncake")
    for key, of in (("dir_bytes", "dir"), ("mooncake_segment_bytes", "mooncake")):
        if getattr(store, key) and not getattr(store, of):
            raise ConnectorStartError(f"{WHERE}.{key} is a size of {of}: give that too, or neither")
    if store.dir and not store.dir.startswith("/"):
        raise ConnectorStartError(f"{WHERE}.dir is {store.dir!r}; give an absolute path")
    host, _, port = store.mooncake.rpartition(":")
    if store.mooncake and (not host or not port.isdigit() or not 0 < int(port) < 65536):
        raise ConnectorStartError(f"{WHERE}.mooncake is {store.mooncake!r}; give the master as HOST:PORT")
    if not 0 < store.load_timeout_s <= 3600:
        raise ConnectorStartError(f"{WHERE}.load_timeout_s must be above 0 and at most 3600")
