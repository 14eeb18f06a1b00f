"""A scripted engine: tests say what each step gives, and see what was submitted and aborted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine_adapter.torch_engine.engine import EngineStats
from engine_adapter.torch_engine.http_server import OpenAIServer
from engine_adapter.torch_engine.metrics import ServerMetrics
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.output_router import OutputRouter
from engine_adapter.torch_engine.routes import routes
from engine_adapter.torch_engine.sequence import EngineRequest, EngineRequestError, RequestOutput
from engine_adapter.torch_engine.tokenizer import Tokenizer
from sidecar.protocol import KvLayout, Plane

MAX_BODY_BYTES = 64 * 1024
SEND_BUFFER_BYTES = 16 * 1024
"""Small, so that a client which doesn't read is felt soon."""


@dataclass
class ScriptedEngine:
    """`on_submit` runs in place of a step; outputs leave through `emit`, as from the engine thread."""

    on_submit: Callable[[ScriptedEngine, EngineRequest], None] = lambda engine, request: None
    alive: bool = True
    max_model_len: int = 128
    model_fingerprint: str = "model"
    vocab_size: int = 1024
    num_blocks_held_by_offers: int = 4
    submitted: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    emit: Callable[[list[RequestOutput]], None] = lambda outputs: None

    def start(self, on_outputs: Callable[[list[RequestOutput]], None]) -> None:
        self.emit = on_outputs

    def shutdown(self) -> None:
        self.alive = False

    def kv_layout(self) -> KvLayout:
        return KvLayout(64, 16, (Plane(0, 4096, 4096),), 1, 1, 32, "float32", "model", "block,layer,kv,token,head")

    def submit(self, request: EngineRequest) -> None:
        self.submitted.append(request)
        self.on_submit(self, request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(self.alive, 0, 0, 0, 64, 60, self.num_blocks_held_by_offers, 0.0625, 7, 5, 3, 11, 2, 16)


@dataclass
class Serving:
    engine: ScriptedEngine
    service: ModelService
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(engine: ScriptedEngine, tokenizer: Tokenizer) -> AsyncIterator[Serving]:
    """The real server over a scripted engine, on a real port."""
    loop = asyncio.get_running_loop()
    router = OutputRouter(loop)
    engine.emit = router.on_outputs
    metrics = ServerMetrics("tiny", engine.stats, with_process=False)
    service = ModelService(engine, tokenizer, router, metrics, "tiny", "/models/tiny")  # type: ignore[arg-type]
    server = OpenAIServer(routes(service, lambda: engine.alive, {"role": "both"}), max_body_bytes=MAX_BODY_BYTES)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    sock.bind(("127.0.0.1", 0))
    listener = await loop.create_server(server, sock=sock)
    try:
        yield Serving(engine, service, listener.sockets[0].getsockname()[1])
    finally:
        listener.close()
        server.pre_shutdown()
        await server.shutdown(0.1)
        await listener.wait_closed()


def says(*token_ids: int, finish: str | None = "length") -> Callable[[ScriptedEngine, EngineRequest], None]:
    """A script: one token a step, the last with a finish reason."""

    def script(engine: ScriptedEngine, request: EngineRequest) -> None:
        for position, token_id in enumerate(token_ids):
            last = position == len(token_ids) - 1
            reason = finish if last else None
            engine.emit([RequestOutput(request.request_id, [token_id], finish_reason=reason)])  # type: ignore[arg-type]

    return script


def fails(status: int, error_type: str) -> Callable[[ScriptedEngine, EngineRequest], None]:
    def script(engine: ScriptedEngine, request: EngineRequest) -> None:
        error = EngineRequestError("it went wrong", error_type, status)
        engine.emit([RequestOutput(request.request_id, [], finish_reason="error", error=error)])

    return script
