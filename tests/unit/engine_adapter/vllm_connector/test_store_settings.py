"""What the extra config may say of the prefix store, and what is refused with which remedy."""

from __future__ import annotations

from typing import Any

import pytest

from engine_adapter.vllm_connector.errors import ConnectorStartError
from engine_adapter.vllm_connector.settings import settings_from
from engine_adapter.vllm_connector.store_settings import StoreSettings, sidecar_flags
from sidecar.cli import config_from


def test_sizes_are_bytes_or_text() -> None:
    store = settings_from("kv_producer", {"store": {"dir": "/kv", "dir_bytes": "2GiB", "memory_bytes": 4096}}).store
    assert store == StoreSettings(dir="/kv", dir_bytes=2 << 30, memory_bytes=4096)
    assert settings_from("kv_both", {}).store is None
    assert settings_from("kv_both", {"sidecar": "/run/s.sock", "store": {}}).store == StoreSettings()


def test_the_sidecar_understands_its_flags() -> None:
    store = StoreSettings("/kv", 1 << 30, 1 << 20, "h:50051", 1 << 10)
    config = config_from(["--socket", "/s", "--engine-id", "e", *sidecar_flags(store, 4)])
    assert (config.store_dir, config.store_dir_bytes, config.store_mooncake) == ("/kv", 1 << 30, "h:50051")
    assert (config.store_memory_bytes, config.store_mooncake_segment_bytes) == (1 << 18, 1 << 8)  # a rank's part
    assert sidecar_flags(StoreSettings(), 1) == ()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"store": "/kv"}, "give a map"),
        ({"store": {}}, "names no tier: give dir, memory_bytes or mooncake"),
        ({"store": {"dirs": "/kv"}}, "store.dirs is not a key .* did you mean dir"),
        ({"store": {"dir": 3}}, "store.dir is 3"),
        ({"store": {"dir": "kv"}}, "absolute path"),
        ({"store": {"dir": "/kv", "dir_bytes": "much"}}, 'dir_bytes is .much.; give bytes, or text like "16GiB"'),
        ({"store": {"dir": "/kv", "dir_bytes": 0}}, "more than 0"),
        ({"store": {"dir": "/kv", "dir_bytes": True}}, "dir_bytes is True"),
        ({"store": {"memory_bytes": 1, "dir_bytes": 1}}, "dir_bytes is a size of dir"),
        ({"store": {"memory_bytes": 1, "mooncake_segment_bytes": 1}}, "is a size of mooncake"),
        ({"store": {"mooncake": "master"}}, "HOST:PORT"),
        ({"store": {"memory_bytes": 1, "load_timeout_s": 0}}, "load_timeout_s"),
        ({"store": {"dir": "/kv"}, "sidecar": "/run/s.sock"}, "give pd-sidecar its --store-... flags instead"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConnectorStartError, match=says):
        settings_from("kv_producer", extra)


def test_a_decoder_has_no_use_for_it() -> None:
    with pytest.raises(ConnectorStartError, match="give it to the prefillers"):
        settings_from("kv_consumer", {"store": {"dir": "/kv"}})
