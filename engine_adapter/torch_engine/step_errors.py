"""Failures in the middle of things, as the requests that they end are told of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence as AbstractSequence

from engine_adapter.torch_engine.sequence import EngineRequestError, Sequence

logger = logging.getLogger(__name__)


def kv_load_error(message: str) -> EngineRequestError:
    return EngineRequestError(message, "kv_load_error", 503)


def internal_error(exc: Exception, seqs: AbstractSequence[Sequence]) -> EngineRequestError:
    """The traceback goes to the log, the client learns that it was the engine's fault."""
    request_ids = ",".join(seq.request_id for seq in seqs)
    logger.error("event=step_failed request_ids=%s error=%r", request_ids, exc, exc_info=exc)
    return EngineRequestError("the engine failed in the step that computed this request", "InternalServerError", 500)
