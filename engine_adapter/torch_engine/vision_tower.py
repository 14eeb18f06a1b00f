"""The model's vision tower: an image's features, computed when a prefill first needs them, kept for a while."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from engine_adapter.torch_engine.prompt_images import Image

_KEPT_BYTES = 64 << 20
"""Features of the images seen last: enough for the chunks of a prompt, and for an image that is asked about again."""


class VisionTower:
    """One image a forward: an image's features depend on nothing but the image.

    `num_encoded` counts forwards. A decoder that pulls its prompts' KV never needs one.
    """

    def __init__(self, tower: Any, device: torch.device, kept_bytes: int = _KEPT_BYTES) -> None:
        self.num_encoded = 0
        self._tower = tower
        self._device = device
        self._kept_bytes = kept_bytes
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    @torch.inference_mode()
    def features(self, image: Image) -> Tensor:
        """[tokens, hidden]."""
        found = self._features.get(image.content_hash)
        if found is None:
            found = self._features[image.content_hash] = self._encode(image)
            num_bytes = sum(features.nbytes for features in self._features.values())
            while num_bytes > self._kept_bytes and len(self._features) > 1:
                num_bytes -= self._features.popitem(last=False)[1].nbytes
        self._features.move_to_end(image.content_hash)
        return found

    def _encode(self, image: Image) -> Tensor:
        pixels = image.pixels().to(self._device, self._tower.dtype)
        features: Tensor = self._tower(pixels, grid_thw=torch.tensor([image.grid], device=self._device)).pooler_output
        if features.shape[0] != image.num_tokens:
            raise ValueError(f"the vision tower gave {features.shape[0]} rows for {image.num_tokens} image tokens")
        self.num_encoded += 1
        return features
