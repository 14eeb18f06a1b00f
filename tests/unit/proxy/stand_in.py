"""A scripted engine: answers like one, unless its script names another act for the next request.

Acts: "ok", "status:N", "hang", "reset", "garbage", "no_kv", "error_event", "role_then_error", "mid_reset" (between
events), "mid_cut" (inside an event), "close_delimited", "json_for_stream", "interim" (a 1xx first), or a coroutine
function that is given (engine, writer, request).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def kv(self) -> dict[str, Any] | None:
        return self.fields.get("kv_transfer_params")


Act = str | Callable[["Engine", asyncio.StreamWriter, Request], Awaitable[None]]
NUM_TOKENS = 4
ROUTES = {"/health", "/metrics", "/reset_prefix_cache", "/v1/models", "/version"}


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    lines = head.decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, target, headers, body, json.loads(body) if body else {})


def whole(status: int, value: Any) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(text: str) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text.encode()), text.encode())


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(chat: bool, i: int) -> str:
    choice: dict[str, Any] = {"index": 0, **({"delta": {"content": f"t{i} "}} if chat else {"text": f"t{i} "})}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


class Engine:
    """`requests` are those it got, `released` the leases it was told to drop, `held` those handed out and not read."""

    def __init__(self, role: str, *, stock: bool = False, host: str = "127.0.0.1") -> None:
        self.role = role
        self.host = host
        self.stock = stock
        self.port = 0
        self.script: list[Act] = []
        self.requests: list[Request] = []
        self.probes: list[Request] = []
        self.released: list[str] = []
        self.hung_up = 0
        self.keep_open = False
        """If set, a client that half-closes does not abort its request."""
        self.gate: asyncio.Event | None = None
        """If set, a prefill answers, and a stream goes on after its first event, only once this is set."""
        self.health_status = 200
        self.exposition = b""
        """What `GET /metrics` answers, if anything."""
        self.complaints: list[str] = []
        self.connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.num_leases = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        with contextlib.suppress(ConnectionError):
            while (request := await read_request(reader)) is not None:
                if request.method == "GET" or request.target.startswith("/reset"):
                    self.probes.append(request)
                    if request.target == "/metrics" and self.exposition:
                        writer.write(whole(200, self.exposition))
                        continue
                    if request.target.partition("?")[0] not in ROUTES:
                        writer.write(whole(404, {"detail": "Not Found"}))
                        continue
                    writer.write(whole(self.health_status, {"object": "list", "data": [{"id": "m"}], "at": self.port}))
                    continue
                act = asyncio.ensure_future(self._act(writer, request))
                gone = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({act, gone}, return_when=asyncio.FIRST_COMPLETED)
                if self.keep_open and not act.done():
                    await asyncio.wait({act})
                if not act.done():
                    self.hung_up += 1
                    act.cancel()  # a closed (or half-closed) connection aborts, as vLLM has it
                gone.cancel()
                await asyncio.gather(act, gone, return_exceptions=True)
                if act.cancelled() or (act.exception() is not None):
                    break
        self.connections.discard(writer)
        writer.close()

    async def _act(self, writer: asyncio.StreamWriter, request: Request) -> None:
        if (request.kv or {}).get("release_only"):
            self.released.append(request.fields["kv_transfer_params"]["remote_request_id"])
            writer.write(whole(200, {}))
            return
        self.requests.append(request)
        act: Act = self.script.pop(0) if self.script else "ok"
        if callable(act):
            await act(self, writer, request)
        elif act.startswith("status:"):
            status = int(act.partition(":")[2])
            error = {"message": f"engine says {status}", "type": "t", "param": None, "code": status}
            writer.write(whole(status, {"error": error}))
        elif act == "hang":
            await asyncio.Event().wait()
        elif act == "reset":
            writer.transport.abort()
        elif act == "garbage":
            writer.write(b"SSH-2.0-nonsense\r\n\r\n")
        elif self.role == "prefill":
            await self.prefill(writer, request, act)
        else:
            await self.decode(writer, request, act)

    async def prefill(self, writer: asyncio.StreamWriter, request: Request, act: str) -> None:
        kv = request.kv or {}
        if not kv.get("do_remote_decode") or request.fields.get("max_tokens") != 1 or request.fields.get("stream"):
            self.complaints.append(f"not a prefill: {request.fields}")
        if self.gate is not None:
            await self.gate.wait()
        self.num_leases += 1
        params = {
            "do_remote_prefill": True,
            "remote_request_id": request.headers["x-request-id"],
            "remote_port": self.port,
            "lease": self.num_leases,
        }
        if not self.stock:
            params["baton"] = {"version": 1, "token": "secret"}
        writer.write(whole(200, {"choices": [], "kv_transfer_params": None if act == "no_kv" else params}))

    async def decode(self, writer: asyncio.StreamWriter, request: Request, act: str) -> None:
        chat = "chat" in request.target
        if act == "interim":
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        if not request.fields.get("stream") or act == "json_for_stream":
            text = "".join(f"t{i} " for i in range(NUM_TOKENS))
            message = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            raw = whole(200, {"id": request.headers["x-request-id"], "choices": [message]})
            if act.startswith("mid_"):
                writer.write(raw[:-5])
                await asyncio.sleep(0.02)
                writer.transport.abort()
                return
            writer.write(raw)
            return
        await self._stream(writer, chat, act)

    async def _stream(self, writer: asyncio.StreamWriter, chat: bool, act: str) -> None:
        role = 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
        error = 'data: {"error":{"message":"KV load failed","type":"kv_load_error","param":null,"code":503}}\n\n'
        if act == "close_delimited":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            for i in range(NUM_TOKENS):
                writer.write(event(chat, i).encode())
            writer.write(b"data: [DONE]\n\n")
            raise ConnectionError("the end is the end of the connection")
        writer.write(STREAM_HEAD)
        if act in ("error_event", "role_then_error"):
            writer.write((chunk(role) if act == "role_then_error" else b"") + chunk(error))
            writer.write(chunk("data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        if chat:
            writer.write(chunk(role))
        for i in range(NUM_TOKENS):
            if i == 2 and act == "mid_cut":
                writer.write(chunk(event(chat, i))[:-10])
                await asyncio.sleep(0.02)
            if i == 2 and act.startswith("mid_"):
                writer.transport.abort()
                return
            writer.write(chunk(event(chat, i)))
            if self.gate is not None and i == 0:
                await self.gate.wait()
            await asyncio.sleep(0.005)
        writer.write(chunk("data: [DONE]\n\n") + b"0\r\n\r\n")
