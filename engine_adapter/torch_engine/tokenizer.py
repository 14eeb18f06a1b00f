"""A model directory's tokenizer: text to ids and back, the bytes of a token, and the chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer

from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.config import EngineStartError
from engine_adapter.torch_engine.detokenizer import ByteTextDecoder, TextDecoder, WindowTextDecoder

logger = logging.getLogger(__name__)


def byte_of_character() -> dict[str, int]:
    """GPT-2's reversible alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Thread-safe after `load`: encoding long texts may be done off the event loop."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: BackendTokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._alphabet = byte_of_character() if isinstance(self._backend.decoder, ByteLevel) else None
        self._special_ids = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Raises EngineStartError where the directory has no usable tokenizer."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        except Exception as error:  # transformers raises whatever its readers meet: OSError, ValueError, KeyError, ...
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EngineStartError(
                f"no tokenizer can be read from {model_dir} ({reason})", "copy the model's tokenizer.json there"
            ) from error
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise EngineStartError(
                f"the tokenizer in {model_dir} has no tokenizer.json", "convert it with transformers' save_pretrained"
            )
        return cls(tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id outside the vocabulary."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._read_token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """A token alone, as text; a piece of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def text_decoder(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> TextDecoder:
        """A decoder for what follows this prompt."""
        if self._alphabet is None:
            return WindowTextDecoder(
                lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens), prompt_token_ids
            )
        return ByteTextDecoder(self._visible_bytes if skip_special_tokens else self.token_bytes, prompt_token_ids)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: list[dict[str, Any]] | None, **template_kwargs: Any
    ) -> str:
        """The prompt by the chat template. Raises ApiError (400) for what the template refuses."""
        if not template_kwargs.get("chat_template") and not self.has_chat_template:
            raise ApiError("this model has no chat template: give one in `chat_template`, or use /v1/completions")
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, **template_kwargs
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise ApiError(f"the chat template refuses these messages: {error}", param="messages") from error
        return text

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self.token_bytes(token_id)

    def _read_token_bytes(self, token_id: int) -> bytes:
        if self._alphabet is None:
            return self.decode([token_id]).encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._alphabet[character] for character in token)
        except KeyError:  # an added token, which stands for itself
            return token.encode()
