from __future__ import annotations

import pytest
import torch

from engine_adapter.device import DEVICES, DeviceUnavailable, open_device, usable_cores


def test_the_host_is_always_there() -> None:
    device = open_device("cpu")
    assert device.host_pool and device.torch_device.type == "cpu"
    assert usable_cores() >= 1


@pytest.mark.parametrize("kind", sorted(DEVICES.keys() - {"cpu"}))
def test_an_accelerator_that_is_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable) as caught:
        open_device(kind)
    assert caught.value.remedy
