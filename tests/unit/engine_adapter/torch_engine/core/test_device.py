from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine_adapter.device import DEVICES, DeviceUnavailable, Progress, open_device, usable_cores


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


def test_a_cpu_is_done_with_what_it_was_given() -> None:
    progress = Progress("cpu")
    assert progress.now()()
    progress.wait()


def test_a_device_is_asked_for_what_was_queued_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    queued = [0]

    class Event:
        def record(self) -> None:
            queued[0] += 1
            self.number = queued[0]

        def query(self) -> bool:
            return self.number in done

    stream = SimpleNamespace(synchronize=lambda: done.extend((1, 2)))
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event, current_stream=lambda: stream))
    progress = Progress("cuda")
    first, second = progress.now(), progress.now()
    done.append(1)
    assert first() and not second()
    progress.wait()
    assert second()
