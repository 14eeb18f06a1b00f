from __future__ import annotations

from pathlib import Path

import pytest

from engine_adapter.torch_engine.sampling_defaults import SamplingDefaults, read_sampling_defaults


def test_a_model_says_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 7, "bos": 1}'
    )
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(0.6, 0.95, 20, 0.0, 1.05, 7)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"temperature": "hot", "top_k": 1.5, "max_new_tokens": true}'])
def test_nothing_readable_asks_for_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
