"""A plain client over one connection: sends bytes, reads one answer at a time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from proxy.chunked_body import ChunkDecoder

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool  # by its framing

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found

    @property
    def text(self) -> str:
        """The text of the answer, streamed or not."""
        return "".join(map(_text_of, self._choices))

    @property
    def texts(self) -> dict[int, str]:
        """That of each choice, by its index."""
        found: dict[int, str] = {}
        for choice in self._choices:
            found[choice["index"]] = found.get(choice["index"], "") + _text_of(choice)
        return found

    @property
    def _choices(self) -> list[dict[str, Any]]:
        if not self.headers["content-type"].startswith("text/event-stream"):
            whole: list[dict[str, Any]] = json.loads(self.body)["choices"]
            return whole
        events = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: {")]
        return [choice for one in events for choice in json.loads(one).get("choices", [])]


def _text_of(choice: dict[str, Any]) -> str:
    part = choice.get("delta") or choice.get("message") or {}
    return str(choice.get("text") or part.get("content") or "")


def request_bytes(path: str, fields: Any, *, version: str = "1.1", **headers: str) -> bytes:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: proxy", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def fields_of(path: str, **more: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    return {"model": "m", "max_tokens": 16, **prompt, **more}


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path: str, fields: Any, **headers: str) -> Answer:
        self.writer.write(request_bytes(path, fields, **headers))
        return await self.answer()

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in raw[1:] if line)
        return int(raw[0].split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self) -> Answer:
        status, headers = await self.head()
        if "content-length" in headers:
            try:
                return Answer(status, headers, await self.reader.readexactly(int(headers["content-length"])), True)
            except asyncio.IncompleteReadError as error:
                return Answer(status, headers, error.partial, False)
        if "transfer-encoding" not in headers:
            return Answer(status, headers, await self.reader.read(), True)
        decoder, body = ChunkDecoder(), b""
        while not decoder.complete:
            try:
                line = await self.reader.readline()
            except ConnectionError:
                line = b""
            if not line:
                break
            body += b"".join(decoder.feed(line)[0])
        return Answer(status, headers, body, decoder.complete)

    async def closed_by_peer(self) -> bool:
        try:
            return not await asyncio.wait_for(self.reader.read(), 3)
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.transport.abort()


async def ask(port: int, path: str, fields: Any, **headers: str) -> Answer:
    client = await Client.connect(port)
    try:
        return await client.post(path, fields, **headers)
    finally:
        client.close()
