"""Runs the model: turns a step's plan into forwards over the paged pool, and their hidden states into logits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine_adapter.device import Device
from engine_adapter.torch_engine.attention import AttentionStep, DecodeStep, PrefillStep, causal_tile_mask
from engine_adapter.torch_engine.batch_invariant import MAX_DECODE_ROWS
from engine_adapter.torch_engine.kv_cache import KvCache
from engine_adapter.torch_engine.kv_rows import BlockRows, WriteRows
from engine_adapter.torch_engine.model_loader import LoadedModel
from engine_adapter.torch_engine.prefill_tiles import tiles_of
from engine_adapter.torch_engine.prompt_images import PromptImages
from engine_adapter.torch_engine.scheduler import PrefillChunk
from engine_adapter.torch_engine.sequence import Sequence

Positions = AbstractSequence[int] | list[list[int]]
"""One a row; or times, heights and widths (M-RoPE), where a prompt has images."""
ImageRows = list[tuple[int, Tensor]]
"""Features that replace the embeddings of as many rows, and the first of these rows."""


class ModelRunner:
    """Stateless between calls but for a memo of block rows; knows nothing of queues."""

    def __init__(self, model: LoadedModel, kv_cache: KvCache, device: Device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._device = device.torch_device
        self._max_tile = device.max_prefill_tile
        self._block_rows: dict[str, BlockRows] = {}
        self.num_layers = model.shape.num_layers
        self.layer_bytes = kv_cache.block_bytes // model.shape.num_layers
        """Of one block."""

    def forget(self, request_id: str) -> None:
        """The sequence's block table is no longer what it was."""
        self._block_rows.pop(request_id, None)

    @torch.inference_mode()
    def prefill(
        self,
        chunk: PrefillChunk,
        on_logits: Callable[[int, Tensor], None] | None = None,
        on_written: Callable[[int, int], None] | None = None,
    ) -> None:
        """Put the KV of the chunk's tokens into the pool.

        `on_logits` is called once a tile: a position, and logits [tokens, vocabulary] of the tokens from there on.
        `on_written` is called once a tile and layer: the KV of that layer is in the pool up to a position.
        """
        for tile in tiles_of(chunk.start, chunk.end, self._max_tile):
            start, end = max(chunk.start, tile[0]), min(chunk.end, tile[1])
            hidden = self._prefill_tile(chunk.sequence, tile, start, end, on_written)
            if on_logits is not None:
                on_logits(start, self._model.lm_head(hidden)[start - tile[0] : end - tile[0]].float())

    def _prefill_tile(
        self,
        seq: Sequence,
        tile: tuple[int, int],
        start: int,
        end: int,
        on_written: Callable[[int, int], None] | None,
    ) -> Tensor:
        """The whole tile is computed, from its first position on; only [start, end) is written."""
        cache, shape = self._kv_cache, self._model.shape
        size = cache.block_size
        token_ids = seq.token_ids[tile[0] : tile[1]]
        token_ids += [0] * (tile[1] - tile[0] - len(token_ids))
        positions = range(start, end)
        step = PrefillStep(
            cache,
            BlockRows.of(seq.block_ids[: -(-tile[0] // size)], shape.num_layers, self._device),
            tile,
            (start, end),
            WriteRows(
                [seq.block_ids[position // size] for position in positions],
                [position % size for position in positions],
                shape.num_layers,
                size,
                self._device,
            ),
            causal_tile_mask(tile, shape.num_heads_per_kv_head, shape.dtype, self._device),
            None if on_written is None else partial(on_written, end),
        )
        self._model.kind.is_decode = False
        images = seq.request.images
        if images is None:
            return self._forward(token_ids, range(*tile), step)
        return self._forward(token_ids, images.positions(*tile), step, self._image_rows(images, (tile[0], end)))

    @torch.inference_mode()
    def decode(self, seqs: AbstractSequence[Sequence]) -> Tensor:
        """Compute each sequence's token at num_computed_tokens; logits [sequences, vocabulary], float32."""
        logits = [
            self._decode_rows(seqs[start : start + MAX_DECODE_ROWS]) for start in range(0, len(seqs), MAX_DECODE_ROWS)
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _decode_rows(self, seqs: AbstractSequence[Sequence]) -> Tensor:
        cache, shape = self._kv_cache, self._model.shape
        size = cache.block_size
        positions = [seq.num_computed_tokens for seq in seqs]
        padding = [0] * (-len(seqs) % self._model.decode_multiple)
        token_ids = [seq.token_ids[position] for seq, position in zip(seqs, positions, strict=True)]
        step = DecodeStep(
            cache,
            [self._rows_of(seq) for seq in seqs],
            [position + 1 for position in positions],
            WriteRows(
                [seq.block_ids[position // size] for seq, position in zip(seqs, positions, strict=True)],
                [position % size for position in positions],
                shape.num_layers,
                size,
                self._device,
            ),
        )
        self._model.kind.is_decode = True
        rotary_positions, image_rows = self._decode_images(seqs, positions, padding)
        hidden = self._forward(token_ids + padding, rotary_positions, step, image_rows)
        logits: Tensor = self._model.lm_head(hidden)
        return logits[: len(seqs)].float()

    def _rows_of(self, seq: Sequence) -> BlockRows:
        """Rows of the blocks that hold tokens up to the one being computed, remembered until another block joins."""
        num_blocks = seq.num_computed_tokens // self._kv_cache.block_size + 1
        rows = self._block_rows.get(seq.request_id)
        if rows is None or rows.num_blocks != num_blocks:
            rows = BlockRows.of(seq.block_ids[:num_blocks], self._model.shape.num_layers, self._device)
            self._block_rows[seq.request_id] = rows
        return rows

    def _decode_images(
        self, seqs: AbstractSequence[Sequence], places: list[int], padding: list[int]
    ) -> tuple[Positions, ImageRows]:
        """Positions of the rows; and features, for a prompt that ends with an image: its last token is decoded too."""
        if all(seq.request.images is None for seq in seqs):
            return places + padding, []
        positions: list[tuple[int, int, int]] = []
        image_rows: ImageRows = []
        for row, (seq, place) in enumerate(zip(seqs, places, strict=True)):
            images = seq.request.images
            positions.append((place, place, place) if images is None else images.position_of(place))
            if images is not None and place < seq.num_prompt_tokens:
                image_rows += [(row, features) for _, features in self._image_rows(images, (place, place + 1))]
        positions += [(place, place, place) for place in padding]
        return [list(axis) for axis in zip(*positions, strict=True)], image_rows

    def _image_rows(self, images: PromptImages, places: tuple[int, int]) -> ImageRows:
        """The features that stand for the image tokens among `places`, with the first row of each."""
        start, end = places
        rows: ImageRows = []
        for placed in images.within(start, end):
            assert self._model.vision is not None
            first, last = max(start, placed.start), min(end, placed.end)
            features = self._model.vision.features(placed.image)
            rows.append((first - start, features[first - placed.start : last - placed.start]))
        return rows

    def _forward(
        self, token_ids: list[int], positions: Positions, step: AttentionStep, image_rows: ImageRows | None = None
    ) -> Tensor:
        """Hidden states [rows, hidden] of one packed row of tokens."""
        tokens = torch.tensor([token_ids], device=self._device)
        place_ids = torch.tensor(positions, device=self._device)
        given: dict[str, Tensor] = {"input_ids": tokens}
        if image_rows:
            embeddings: Tensor = self._model.backbone.embed_tokens(tokens)  # type: ignore[operator]
            for row, features in image_rows:
                embeddings[0, row : row + features.shape[0]] = features
            given = {"inputs_embeds": embeddings}
        out: Any = self._model.backbone(
            position_ids=place_ids.unsqueeze(-2), use_cache=False, attention_step=step, **given
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden
