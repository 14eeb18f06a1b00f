"""Mock engines of contract `layerwise` (kv-contracts section 2.4, ascend-proxy.md 2.2).

A decoder calls the metaserver once for each prompt and waits, without a time-out, until a prefiller has pushed. A
prefiller pushes where its parameters say, which have to be exactly what the decoder posted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

from bench import mock_other_apis as other_apis
from bench.mock_answers import answer_id, prompt_of, scripts_of
from bench.mock_faults import Fault
from bench.mock_http import Connection, Request, json_response
from bench.mock_instance import MockInstance, _after
from bench.mock_ledger import KvLedger
from bench.mock_pairs import _one_token

Fields = dict[str, Any]
NUM_TRIES = 3


@dataclass(eq=False)
class Waiting:
    """A request in a decoder: what it posted for each child, and what goes on when all was pushed."""

    request_id: str
    posted: dict[str, Fields]
    start: Any
    pushed: bool = False


@dataclass
class Decodes:
    ledger: KvLedger
    waiting: dict[str, Waiting] = field(default_factory=dict)


@dataclass(eq=False)
class LayerwiseInstance(MockInstance):
    decodes: Decodes = field(kw_only=True)
    tasks: set[asyncio.Task[None]] = field(default_factory=set, kw_only=True)

    def handle(self, connection: Connection, request: Request) -> None:
        if request.path == "/server_info":
            config = {"vllm_config": {"kv_transfer_config": {"kv_connector": "MooncakeLayerwiseConnector"}}}
            connection.answer(json_response(200, orjson.dumps(config)))
        else:
            super().handle(connection, request)

    def _decode(
        self, connection: Connection, request: Request, fields: Fields, chat: bool, fault: Fault | None
    ) -> None:
        alone = super()._decode
        self._serve(
            connection, request, fields, chat, fault,
            lambda told: alone(connection, request, told, chat, fault),
        )  # fmt: skip

    def _decode_other(
        self, connection: Connection, request: Request, fields: Fields, api: str, fault: Fault | None
    ) -> None:
        alone = super()._decode_other
        self._serve(
            connection, request, fields, True, fault,
            lambda told: alone(connection, request, told, api, fault),
        )  # fmt: skip

    def _serve(
        self, connection: Connection, request: Request, fields: Fields, chat: bool, fault: Fault | None,
        alone: Callable[[Fields], None],
    ) -> None:  # fmt: skip
        params = fields.get("kv_transfer_params")
        if not params:
            alone(fields)
            return
        check, request_id = self.ledger.check, request.request_id
        posts = self._posts(request_id, fields, chat)
        several = {"num_children": len(posts)} if len(posts) > 1 else {}
        told = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": params.get("metaserver"), **several}
        check(params == told, f"decode: told {params}")
        check(params.get("do_remote_prefill") is True, "decode: do_remote_prefill is not true")
        check(params.get("do_remote_decode") is False, "decode: do_remote_decode is not false")
        check(request_id not in self.decodes.waiting, f"decode: {request_id} is in use")

        def start(kv: Fields) -> None:
            connection.on_lost = lambda: self.aborted(connection)
            alone({**fields, "kv_transfer_params": kv})

        def left() -> None:
            self.aborted(connection)
            self.decodes.waiting.pop(request_id, None)

        waiting = Waiting(request_id, posts, start)
        self.decodes.waiting[request_id] = waiting
        connection.on_lost = left
        self.counts["waits"] += 1
        if fault is not None and fault.kind == "error_event":  # it fails before it has called
            self._fail_within(connection, b"", fault)
            return
        for posted in waiting.posted.values():
            task = asyncio.ensure_future(self._call(str(params.get("metaserver")), posted))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def _posts(self, request_id: str, fields: Fields, chat: bool) -> dict[str, Fields]:
        prompt, name = prompt_of(fields), answer_id(chat, request_id)
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        names = [name] if chat else [f"{name}-{i}" for i in range(len(prompt) if several else 1)]
        return {
            one: {
                "token_ids": [], "request_id": one, "do_remote_prefill": False, "do_remote_decode": True,
                "remote_block_ids": [[i, i + 1]], "remote_block_size": [16], "remote_engine_id": f"d-{self.port}",
                "remote_host": self.host, "remote_port": self.port, "remote_tp_size": 1, "remote_pcp_size": 1,
                "remote_dcp_size": 1, "remote_cached_tokens": 0, "opaque ☃": {"big": 2**53 + 1},
            }
            for i, one in enumerate(names)
        }  # fmt: skip

    async def _call(self, url: str, posted: Fields) -> None:
        """As the connector does it: three tries to get through, no time-out, whatever the status."""
        parts, body = urlsplit(url), orjson.dumps(posted)
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(body)}\r\n"
        for _ in range(NUM_TRIES):
            try:
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            except OSError:
                self.counts["metaserver_unreachable"] += 1
                continue
            try:
                writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
                answer = await reader.read()
                self.counts[f"metaserver_{answer.split()[1].decode()}"] += 1
                return
            except (OSError, IndexError):
                self.counts["metaserver_broken"] += 1
            finally:
                writer.close()

    def _prefill(
        self, connection: Connection, request: Request, fields: Fields, chat: bool, fault: Fault | None
    ) -> None:
        self.counts["prefills"] += 1
        ledger, request_id = self.ledger, request.request_id
        _one_token(ledger.check, request.path, fields)
        waiting = self.decodes.waiting.get(request_id)
        params = dict(fields.get("kv_transfer_params") or {})
        if waiting is not None:
            batch = params.pop("batch_kv_transfer_params", None)
            first = next(iter(waiting.posted.values()))
            ledger.check(params == first, f"prefill: {request_id}: not verbatim: {params}")
            ledger.check((batch or {first["request_id"]: params}) == waiting.posted, f"prefill: batch is {batch}")
            ledger.check(list(batch or [0]) == list(waiting.posted if batch else [0]), "prefill: batch out of order")
            ledger.check(not waiting.pushed, f"prefill: {request_id} is prefilled twice")
        else:
            self.counts["prefilled_for_nobody"] += 1
        first, num_cached = scripts_of(fields, 1)[0], self._shape(fields, "cached_tokens", 0)
        told = other_apis.prefill_answer(request.path, first, chat, request_id, self.model, num_cached)
        body = json_response(200, told)

        def finish() -> None:
            if connection.gone:
                return
            if fault is not None and fault.kind == "push_failed":
                params = {"baton": {"version": 1, "push_failed": fault.message}}
                told = orjson.dumps({**orjson.loads(body.partition(b"\r\n\r\n")[2]), "kv_transfer_params": params})
                self._answer(connection, json_response(200, told))
                return
            if fault is not None:
                self._fail_within(connection, body, fault)
                return
            self._push(request_id, scripts_of(fields)[0])
            _after(self._shape(fields, "answer_s", 0), lambda: self._answer(connection, body))

        _after(self._shape(fields, "prefill_s", self.pace.prefill_s), finish)

    def _push(self, request_id: str, script: Any) -> None:
        waiting = self.decodes.waiting.pop(request_id, None)
        if waiting is None:
            self.counts["pushed_into_freed"] += 1
            return
        waiting.pushed = True
        producer = f"{self.host}:{self.port}"
        waiting.start(
            self.ledger.hand_out(producer, self.epoch, request_id, script.fingerprint, script.num_prompt_tokens)
        )
