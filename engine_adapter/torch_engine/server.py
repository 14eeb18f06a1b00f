"""The engine instance: everything is constructed, started, watched and ended here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from engine_adapter.torch_engine.api_errors import service_unavailable
from engine_adapter.torch_engine.chat_images import ImageReader
from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.engine import Engine
from engine_adapter.torch_engine.http_server import OpenAIServer
from engine_adapter.torch_engine.kv_link import KvLink, build_kv_transfer
from engine_adapter.torch_engine.kv_memory import choose_kv_memory
from engine_adapter.torch_engine.metrics import ServerMetrics
from engine_adapter.torch_engine.model_service import ModelService
from engine_adapter.torch_engine.output_router import OutputRouter
from engine_adapter.torch_engine.routes import routes
from engine_adapter.torch_engine.sampling_defaults import read_sampling_defaults
from engine_adapter.torch_engine.server_config import ServerConfig
from engine_adapter.torch_engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections the kernel holds while the loop is busy: a burst of clients must not lose its SYNs."""
WATCH_INTERVAL_S = 0.25
DEAD_ENGINE_GRACE_S = 2.0
"""How long a dead engine's instance still answers 503, so that its clients learn why, before it exits."""
DRAIN_POLL_S = 0.02
OFFER_GRACE_S = 3.0
"""How long a draining prefiller waits for its last offers to be fetched: a hand-off takes milliseconds, and what nobody
has claimed by then is an orphan that need not hold the exit up for a whole lease."""
FLUSH_TIMEOUT_S = 0.5
"""For last bytes on their way to a slow client."""
CANCEL_TIMEOUT_S = 0.1


def serve(config: ServerConfig, engine_config: EngineConfig) -> int:
    """`pd-engine serve`: until SIGTERM or SIGINT. Raises EngineStartError for whatever keeps it from serving."""
    logging.basicConfig(
        level=config.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    check_model_directory(engine_config.model)
    sock = bind(config.host, config.port)
    with contextlib.ExitStack() as stack:
        stack.callback(sock.close)
        memory = choose_kv_memory(config, engine_config)
        engine = Engine(engine_config, shared_pool=memory is None or memory.needs_shared_pool)
        stack.callback(engine.shutdown)
        tokenizer = Tokenizer.load(engine_config.model)
        image_reader = None
        if engine.image_token_id is not None:
            image_reader = ImageReader.of(engine_config.model, engine.image_token_id, config)
        metrics = ServerMetrics(config.served_model_name or str(engine_config.model), engine.stats)
        kv_link = stack.enter_context(
            build_kv_transfer(config, engine, metrics.observe_pull, metrics.observe_load, memory)
        )
        stack.callback(engine.shutdown)  # also before the link goes: the engine thread uses it
        instance = Instance(config, engine_config, engine, tokenizer, metrics, kv_link, sock, image_reader)
        return uvloop.run(instance.run())


@dataclass(slots=True)
class Instance:
    """One engine behind one address."""

    config: ServerConfig
    engine_config: EngineConfig
    engine: Engine
    tokenizer: Tokenizer
    metrics: ServerMetrics
    kv_link: KvLink
    sock: socket.socket
    image_reader: ImageReader | None = None

    async def run(self) -> int:
        """Serve until told to stop (0) or until the engine dies (1)."""
        loop = asyncio.get_running_loop()
        router = OutputRouter(loop)
        service = ModelService(
            engine=self.engine,
            tokenizer=self.tokenizer,
            router=router,
            metrics=self.metrics,
            model_name=self.metrics.model_name,
            model_root=str(self.engine_config.model),
            image_reader=self.image_reader,
            defaults=read_sampling_defaults(self.engine_config.model),
        )
        self.engine.start(router.on_outputs)
        server = OpenAIServer(
            routes(service, self._is_healthy, self._facts()), max_body_bytes=self.config.max_body_bytes
        )
        listener = await self._listen(loop, server)
        stopping, stop_now = _stop_events(loop)
        self._say_ready()
        dead = loop.create_task(self._engine_death(service))
        stop = loop.create_task(stopping.wait())
        try:
            await asyncio.wait((dead, stop), return_when=asyncio.FIRST_COMPLETED)
            service.draining = True
            listener.close()
            if not dead.done():
                await self._drain(service, stop_now)
        finally:
            await self._close(server, dead, stop)
        return 1 if dead.done() and not dead.cancelled() else 0

    def _is_healthy(self) -> bool:
        return self.engine.stats().alive and self.kv_link.available

    def _facts(self) -> dict[str, Any]:
        layout = self.engine.kv_layout()
        return {
            "role": self.config.role,
            "engine": json.loads(self.engine_config.model_dump_json()),
            "server": json.loads(self.config.model_dump_json()),
            "max_model_len": self.engine.max_model_len,
            "num_blocks": layout.num_blocks,
            "block_bytes": layout.block_bytes,
            "model_fingerprint": self.engine.model_fingerprint,
        }

    async def _listen(self, loop: asyncio.AbstractEventLoop, server: OpenAIServer) -> asyncio.Server:
        try:
            self.sock.listen(BACKLOG)  # by ourselves: uvloop does not raise what listen refuses
        except OSError as error:  # two engines may bind one port while neither listens yet
            raise _cannot_listen(self.config.host, self.config.port, error) from error
        return await loop.create_server(server, sock=self.sock, backlog=BACKLOG)

    def _say_ready(self) -> None:
        host, port = self.sock.getsockname()[:2]
        print(
            f"ready listen={host}:{port} role={self.config.role} model={self.metrics.model_name} "
            f"sidecar={self.kv_link.socket_path} max_model_len={self.engine.max_model_len} "
            f"blocks={self.engine.stats().num_blocks}",
            flush=True,
        )

    async def _engine_death(self, service: ModelService) -> None:
        """Returns a while after the engine thread has ended by itself; whoever waits for it is told at once."""
        while self.engine.stats().alive:  # noqa: ASYNC110  (a dying thread tells nobody)
            await asyncio.sleep(WATCH_INTERVAL_S)
        logger.critical("engine_died requests_failed=%d exit_in_s=%.1f", service.router.num_open, DEAD_ENGINE_GRACE_S)
        service.router.fail_all(service_unavailable("the engine has died: this instance ends"))
        await asyncio.sleep(DEAD_ENGINE_GRACE_S)

    async def _drain(self, service: ModelService, stop_now: asyncio.Event) -> None:
        """Let running requests end and offered KV be fetched; a second signal or the deadline cuts that short."""
        now = time.monotonic()
        deadline = now + self.config.drain_timeout_s
        offers_deadline = now + OFFER_GRACE_S
        logger.info("draining in_flight=%d timeout_s=%.1f", service.num_in_flight, self.config.drain_timeout_s)
        while service.num_in_flight or self.engine.stats().num_blocks_held_by_offers:
            now = time.monotonic()
            if service.num_in_flight:
                offers_deadline = now + OFFER_GRACE_S
            if stop_now.is_set() or now > min(deadline, offers_deadline) or not self.engine.stats().alive:
                logger.warning("drain_cut_short in_flight=%d", service.num_in_flight)
                return
            await asyncio.sleep(DRAIN_POLL_S)

    async def _close(self, server: OpenAIServer, *tasks: asyncio.Task[Any]) -> None:
        for task in tasks:
            if not task.done():
                task.cancel()
        server.pre_shutdown()
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while server.connections and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        await server.shutdown(CANCEL_TIMEOUT_S)
        await asyncio.to_thread(self.engine.shutdown)
        logger.info("stopped")


def check_model_directory(directory: Path) -> None:
    """What can be said before a port is bound or a library loaded. Raises EngineStartError."""
    if directory.is_file():
        raise EngineStartError(f"{directory} is a file", "name the directory it lies in: config.json is read there")
    if not directory.is_dir():
        raise EngineStartError(
            f"there is no model directory {directory}",
            f"name a Hugging Face directory, or make one: pd-engine make-model {directory}",
        )
    config = directory / "config.json"
    try:
        fields = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise EngineStartError(
            f"{config} can't be read ({type(error).__name__})", "name a directory with a whole model in it"
        ) from error
    if not isinstance(fields, dict):
        raise EngineStartError(f"{config} holds no JSON object", "name a directory with a whole model in it")


def bind(host: str, port: int) -> socket.socket:
    """The listening address, taken before anything slow is done. Raises EngineStartError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from error
    return sock


def _cannot_listen(host: str, port: int, error: Exception) -> EngineStartError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return EngineStartError(f"port {port} on {host} is in use", "stop what listens there, or give another --port")
    return EngineStartError(f"{host}:{port} can't be listened on ({error})", "give another --host or --port")


def _stop_events(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and by the second SIGTERM or SIGINT."""
    stopping, stop_now = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (stop_now if stopping.is_set() else stopping).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping, stop_now
