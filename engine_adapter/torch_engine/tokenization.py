"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from engine_adapter.torch_engine.api_errors import ApiError
from engine_adapter.torch_engine.chat import render_prompt
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.openai_requests import DetokenizeRequest, TokenizeRequest, parse_body


async def tokenize(service: ModelService, raw: bytes) -> dict[str, Any]:
    """A plain prompt gets special tokens by default, a chat has them from its template. Raises ApiError."""
    body = parse_body(TokenizeRequest, raw)
    service.check_model(body.model)
    is_chat = body.messages is not None
    text, sources = render_prompt(service, body.messages, body) if body.messages else (body.prompt or "", [])
    add_special_tokens = (not is_chat) if body.add_special_tokens is None else body.add_special_tokens
    if sources:
        token_ids, _ = await service.image_prompt(text, sources, add_special_tokens=add_special_tokens, prepare=False)
    else:
        token_ids = await service.tokenize(text, add_special_tokens=add_special_tokens)
    token_strs = [service.tokenizer.token_string(token_id) for token_id in token_ids]
    return {
        "count": len(token_ids),
        "max_model_len": service.engine.max_model_len,
        "tokens": token_ids,
        "token_strs": token_strs if body.return_token_strs else None,
    }


async def detokenize(service: ModelService, raw: bytes) -> dict[str, Any]:
    """Raises ApiError."""
    body = parse_body(DetokenizeRequest, raw)
    service.check_model(body.model)
    if body.tokens and max(body.tokens) >= service.engine.vocab_size:
        raise ApiError(f"Token id {max(body.tokens)} is out of vocabulary", param="tokens")
    return {"prompt": service.tokenizer.decode(body.tokens)}
