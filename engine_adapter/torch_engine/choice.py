"""One continuation of one prompt: engine outputs in, text deltas out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine_adapter.torch_engine.detokenizer import Detokenizer
from engine_adapter.torch_engine.prompt_images import PromptImages
from engine_adapter.torch_engine.sequence import RequestOutput, TokenLogprobs

StopReason = int | str | None


@dataclass(slots=True)
class Prompt:
    """`text` is None for a prompt that came as token ids."""

    token_ids: list[int]
    text: str | None = None
    images: PromptImages | None = None


@dataclass(slots=True)
class ChoiceDelta:
    """What one step added to a choice. `is_first` on its first one."""

    choice: Choice
    text: str
    token_ids: Sequence[int]
    logprobs: list[TokenLogprobs] | None
    num_tokens: int
    """Generated so far, these included."""
    is_first: bool
    finish_reason: str | None = None
    stop_reason: StopReason = None


@dataclass(slots=True)
class Choice:
    """A choice's text and counts so far; after `finish_reason` is set nothing follows."""

    index: int
    prompt: Prompt
    engine_request_id: str
    detokenizer: Detokenizer
    include_stop_str: bool = False
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_chars: int = 0
    """Of text delivered, an echoed prompt included."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: StopReason = None
    num_cached_tokens: int = 0
    kv_transfer_params: dict[str, Any] | None = None
    engine_finished: bool = False
    """The engine knows that it is over; otherwise it has to be told (abort)."""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def advance(self, output: RequestOutput) -> ChoiceDelta:
        """Take one step's output. A stop string beats whatever reason the engine gives, as in vLLM."""
        is_first = not self.token_ids
        self.engine_finished = output.finish_reason is not None
        if is_first:
            self.num_cached_tokens = output.num_cached_tokens
            self.prompt_logprobs = output.prompt_logprobs
        self.kv_transfer_params = output.kv_transfer_params or self.kv_transfer_params
        self.token_ids += output.token_ids
        if output.logprobs:
            self.logprobs += output.logprobs
        text = self._text_of(output)
        if self.detokenizer.stop_hit is not None:
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop_hit
        elif output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        if text:
            self.texts.append(text)
        return ChoiceDelta(
            self,
            text,
            output.token_ids,
            output.logprobs,
            num_tokens=len(self.token_ids),
            is_first=is_first,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _text_of(self, output: RequestOutput) -> str:
        """A stop or EOS token that ended the request is not part of the text, unless stop strings are wanted in it."""
        visible = output.token_ids
        if output.finish_reason == "stop" and visible and not self.include_stop_str:
            visible = visible[:-1]
        text = self.detokenizer.push(visible)
        if output.finish_reason is not None and self.detokenizer.stop_hit is None:
            text += self.detokenizer.finish()
        return text
