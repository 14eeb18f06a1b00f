"""One mock engine behind one port: what it does with a request. `bench.mock_engine` is the command."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from bench import mock_other_apis as other_apis
from bench.mock_answers import (
    DONE_EVENT,
    EventTemplate,
    answer_id,
    given_up,
    script_of,
    scripts_of,
    tokens_of,
    whole_answer,
)
from bench.mock_faults import BEFORE, Fault
from bench.mock_http import (
    LAST_CHUNK,
    STREAM_HEAD,
    Connection,
    Request,
    chunk,
    error_object,
    error_response,
    json_response,
)
from bench.mock_ledger import KvLedger, KvRefused
from bench.mock_port import Port
from bench.mock_several import ManyTemplates, is_plain, scores_prompt, whole_answer_of_all

BACKLOG = 4096
GARBAGE_CHUNK = b"no length of a chunk\r\n"
MAX_RECORDED = 256
HOT = {"/v1/completions": False, "/v1/chat/completions": True}
_epochs = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds: of a prefill, until the first token, between two tokens (0: as fast as can be)."""

    prefill_s: float = 0.0
    first_token_s: float = 0.0
    interval_s: float = 0.0


class StepLoop:
    """The step of an engine: all streams of one pace get their next token at the same tick."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.streams: set[Stream] = set()
        self._running = False

    def add(self, stream: Stream) -> None:
        self.streams.add(stream)
        if not self._running:
            self._running = True
            self._next_at = asyncio.get_running_loop().time()
            self._rearm()

    def _rearm(self) -> None:
        loop = asyncio.get_running_loop()
        if self.interval_s <= 0:
            loop.call_soon(self._tick)
            return
        self._next_at = max(self._next_at + self.interval_s, loop.time())
        loop.call_at(self._next_at, self._tick)

    def _tick(self) -> None:
        for stream in list(self.streams):
            if not stream.step():
                self.streams.discard(stream)
        if self.streams:
            self._rearm()
        else:
            self._running = False


@dataclass(eq=False, slots=True)
class Stream:
    connection: Connection
    template: EventTemplate | ManyTemplates
    loop: StepLoop
    instance: MockInstance
    fault: Fault | None
    index: int = 0

    def step(self) -> bool:
        """Send one token. False: this stream is not to be stepped any more."""
        connection, index = self.connection, self.index
        if connection.gone:
            return False
        if self.instance.frozen:
            self.instance.when_thawed(lambda: self.loop.add(self))
            return False
        if connection.paused:
            connection.on_resumed = lambda: self.loop.add(self)
            return False
        fault = self.fault
        if fault is not None and fault.kind == "cut_at":
            return self._cut(fault)
        if fault is not None and index >= fault.after:
            return self._fail(fault)
        events = self.template.token_events(index)
        if index == 0:
            opening = b"".join(chunk(event) for event in self.template.first_events())
            connection.send(STREAM_HEAD + opening + chunk(b"".join(events)))
        else:
            connection.send(chunk(events[0] if len(events) == 1 else b"".join(events)))
        self.index = index + 1
        if self.index < self.template.script.num_tokens:
            return True
        connection.send(b"".join(chunk(event) for event in self.template.last_events()) + LAST_CHUNK)
        self.instance.finished(connection)
        return False

    def _cut(self, fault: Fault) -> bool:
        """All of the stream at once, up to a byte of its body."""
        template = self.template
        events = template.first_events()
        for index in range(template.script.num_tokens):
            events += template.token_events(index)
        body = b"".join(chunk(event) for event in [*events, *template.last_events()]) + LAST_CHUNK
        self.connection.send(STREAM_HEAD + body[: fault.after])
        self.connection.close()
        return False

    def _fail(self, fault: Fault) -> bool:
        connection = self.connection
        if fault.kind == "recomputed":
            head = STREAM_HEAD if self.index == 0 else b""
            connection.send(head + chunk(self.template.recomputed_event()) + chunk(DONE_EVENT) + LAST_CHUNK)
            self.instance.finished(connection)
            return False
        if fault.kind == "hang_mid":
            return False
        if fault.kind in ("error_event", "error_event_mid"):
            event = b"data: %b\n\n" % orjson.dumps(error_object(500, fault.message, "mock_error"))
            head = STREAM_HEAD if self.index == 0 else b""
            connection.send(head + chunk(event) + chunk(DONE_EVENT) + LAST_CHUNK)
            self.instance.finished(connection)
        elif fault.kind == "reset_mid":
            connection.reset()
        elif fault.kind == "garbage_mid":
            connection.send(GARBAGE_CHUNK)
        else:
            connection.close()
        return False


@dataclass(eq=False)
class MockInstance:
    """One engine behind one port."""

    host: str
    port: int
    role: str
    ledger: KvLedger
    model: str
    pace: Pace
    record: bool
    control: Callable[[Connection, Request], None]
    num_tokens: int | None = None
    epoch: str = ""
    faults: deque[Fault] = field(default_factory=deque)
    connections: set[Connection] = field(default_factory=set)
    running: set[Connection] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    recorded: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_RECORDED))
    healthy: bool = True
    mute: bool = False
    """`/health` is not answered."""
    choices_have_kv = False  # each of its own
    frozen: bool = False
    _held: list[Callable[[], None]] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    """By path: what a route beside the hot ones answers instead of 200."""
    _server: asyncio.Server | None = None
    _claim: Port | None = None
    _deaf: list[socket.socket] = field(default_factory=list)
    _loops: dict[float, StepLoop] = field(default_factory=dict)

    async def start(self) -> None:
        if self._server is not None:
            return
        for one in self._deaf:
            one.close()
        self._deaf.clear()
        loop = asyncio.get_running_loop()
        if self._claim is None:
            self._claim = Port(self.host, self.port)
            self.port = self._claim.number
        listener = self._claim.bound()
        self.epoch = f"e{next(_epochs)}"
        self._server = await loop.create_server(
            lambda: Connection(self.handle, self.connections, self.ledger.violation), sock=listener, backlog=BACKLOG
        )

    async def close(self) -> None:
        """Stop for good."""
        await self.stop()
        for one in (*self._deaf, self._claim):
            if one is not None:
                one.close()
        self._claim = None

    async def stop(self) -> None:
        """As `kill -9` looks from outside: no listener, every connection reset, the KV gone."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for connection in list(self.connections):
            connection.reset()
        self.running.clear()
        self.ledger.void(f"{self.host}:{self.port}")

    async def go_deaf(self) -> None:
        """Stop, and let nobody connect or be refused: as a machine without power looks to those who connect."""
        await self.stop()
        assert self._claim is not None
        listener = self._claim.bound()
        listener.listen(0)
        self._deaf.append(listener)
        for _ in range(4):  # fill the queue of those that nobody accepts; the kernel ignores who comes then
            one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            one.setblocking(False)
            one.connect_ex((self.host, self.port))
            self._deaf.append(one)

    def freeze(self) -> None:
        """As SIGSTOP: connections are made and kept, what is sent is taken, and nothing is answered until `thaw`."""
        self.frozen = True

    def when_thawed(self, go_on: Callable[[], None]) -> None:
        self._held.append(go_on)

    def thaw(self) -> None:
        self.frozen = False
        held, self._held = self._held, []
        for go_on in held:
            go_on()

    def handle(self, connection: Connection, request: Request) -> None:
        if request.path == "/tokenize" and b'"add_special_tokens"' in request.body:  # else a route of `mock_routes`
            tokens = tokens_of(orjson.loads(request.body)["prompt"])
            connection.answer(json_response(200, orjson.dumps({"tokens": tokens, "count": len(tokens)})))
            return
        if self.frozen:
            self._held.append(lambda: self.abandoned(request) if connection.gone else self.handle(connection, request))
            return
        if self.mute and request.path == "/health":
            return
        api = other_apis.PATHS.get(request.path, "")
        chat = bool(api) or HOT.get(request.path)
        if chat is None or request.method != "POST":
            self.control(connection, request)
            return
        self.counts["requests"] += 1
        try:
            fields = orjson.loads(request.body)
        except orjson.JSONDecodeError:
            self.ledger.violation(f"{self.role}: a body that is not JSON was passed on")
            connection.answer(error_response(400, "not JSON"))
            return
        if self.record:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers.items()}
            self.recorded.append({"path": request.target, "headers": headers, "body": fields})
        self.running.add(connection)
        connection.on_lost = lambda: self.aborted(connection)
        params = fields.get("kv_transfer_params") or {}
        if params.get("release_only"):
            self._release(connection, request, fields, params, chat)
            return
        fault = self._next_fault()
        if fault is not None and fault.kind in BEFORE and not fault.consumes:
            self._fail_before(connection, fault)
        elif self.role == "prefill" or (self.role == "both" and params.get("do_remote_decode")):
            self._prefill(connection, request, fields, chat, fault)
        elif api:
            self._decode_other(connection, request, fields, api, fault)
        else:
            self._decode(connection, request, fields, chat, fault)

    def abandoned(self, request: Request) -> None:
        """A request is read whose client is gone: it was frozen meanwhile."""

    def finished(self, connection: Connection) -> None:
        self.counts["finished"] += 1
        self.running.discard(connection)
        connection.done()

    def aborted(self, connection: Connection) -> None:
        if connection in self.running:
            self.counts["aborted"] += 1
            self.running.discard(connection)

    def _answer(self, connection: Connection, payload: bytes) -> None:
        if self.frozen:
            self._held.append(lambda: self._answer(connection, payload))
            return
        if not connection.gone:
            connection.send(payload)
            self.finished(connection)

    def _next_fault(self) -> Fault | None:
        while self.faults:
            if self.faults[0].take():
                self.counts["faults"] += 1
                return self.faults[0]
            self.faults.popleft()
        return None

    def _fail_before(self, connection: Connection, fault: Fault) -> None:
        if fault.kind == "status":
            self._answer(connection, error_response(fault.status, fault.message))
        elif fault.kind == "reset_before_head":
            connection.reset()
        elif fault.kind == "close_before_head":
            connection.close()
        elif fault.kind == "garbage":
            connection.send(b"\x16\x03\x01 this is not HTTP\r\n\r\n\x00\xff")
            connection.close()

    def _release(self, connection: Connection, request: Request, fields: Any, params: Any, chat: bool) -> None:
        self.counts["release_only"] += 1
        self.ledger.check(_limited(request, fields).get("max_tokens") == 1, "release: max_tokens is not 1")
        self.ledger.check(not fields.get("stream"), "release: streamed")
        try:
            self.ledger.release(params)
        except KvRefused as error:
            self._answer(connection, error_response(400, str(error)))
            return
        name = answer_id(chat, request.request_id)
        self._answer(connection, json_response(200, whole_answer(script_of(fields, 0), chat, name, self.model)))

    def _prefill(
        self, connection: Connection, request: Request, fields: dict[str, Any], chat: bool, fault: Fault | None
    ) -> None:
        self.counts["prefills"] += 1
        ledger, request_id = self.ledger, request.request_id
        ledger.check_prefill(_limited(request, fields), request_id, can_force=request.path != "/v1/messages")
        delay_s = self._shape(fields, "prefill_s", self.pace.prefill_s)

        def answer() -> None:
            if connection.gone:
                return
            if self.frozen:
                self._held.append(answer)
                return
            script = scripts_of(fields, 1)[0]
            more: dict[str, Any] = {}
            if fault is None or fault.kind != "no_kv":
                producer = f"{self.host}:{self.port}"
                more["kv_transfer_params"] = ledger.hand_out(
                    producer,
                    self.epoch,
                    request_id,
                    script.fingerprint,
                    script.num_prompt_tokens,
                    self._shape(fields, "cached_tokens", 0),
                )
            name, num_cached = answer_id(chat, request_id), self._shape(fields, "cached_tokens", 0)
            if api := other_apis.PATHS.get(request.path):
                body = other_apis.whole(api, script, request_id, self.model, num_cached, **more)
            elif is_plain(fields):
                body = whole_answer(script, chat, name, self.model, num_cached_tokens=num_cached, **more)
            else:
                body = whole_answer_of_all(fields, 1, chat, name, self.model, **more)
            if fault is not None and fault.kind != "no_kv":
                ledger.void_one(more["kv_transfer_params"])
                self._fail_within(connection, json_response(200, body), fault)
            else:
                self._answer(connection, json_response(200, body))

        _after(delay_s, answer)

    def _decode(
        self, connection: Connection, request: Request, fields: dict[str, Any], chat: bool, fault: Fault | None
    ) -> None:
        self.counts["decodes"] += 1
        num_tokens = self._shape(fields, "num_tokens", self.num_tokens)
        scripts = scripts_of(fields, num_tokens)
        script = scripts[0]
        if chat and script.first:
            continued = fields.get("continue_final_message") is True and fields.get("add_generation_prompt") is False
            self.ledger.check(continued, "decode: an assistant's last message that is not to be continued")
        if not self._claimed(connection, request, fields, script.fingerprint):
            return
        if fault is not None and fault.kind in BEFORE:
            self._fail_before(connection, fault)
            return
        name, num_choices = answer_id(chat, request.request_id), _number(fields.get("n"))
        interval_s = self._shape(fields, "interval_s", self.pace.interval_s)
        delay_s = self._shape(fields, "first_token_s", self.pace.first_token_s)
        if not _is_true(fields.get("stream")):
            if is_plain(fields):
                num_cached = self._shape(fields, "decoder_cached_tokens", 0)
                told = whole_answer(script, chat, name, self.model, num_choices, num_cached)
            else:
                told = whole_answer_of_all(fields, num_tokens, chat, name, self.model)
            body = json_response(200, told)
            if fault is not None and fault.kind == "recomputed":
                given = json_response(200, given_up(script, fault.after, chat, name, self.model))
                _after(delay_s + interval_s * fault.after, lambda: self._answer(connection, given))
                return
            answer = self._answer if fault is None else self._fail_within
            arguments = (connection, body) if fault is None else (connection, body, fault)
            _after(delay_s + interval_s * script.num_tokens, lambda: answer(*arguments))
            return
        usage = bool((fields.get("stream_options") or {}).get("include_usage"))
        template: EventTemplate | ManyTemplates
        if len(scripts) == 1:
            num_cached = self._shape(fields, "decoder_cached_tokens", 0)
            template = EventTemplate(script, chat, name, self.model, num_choices, num_cached, usage)
            template.with_ids = bool(fields.get("return_token_ids"))
        else:
            template = ManyTemplates(scripts, chat, name, self.model, num_choices, usage)
        loop = self._loops.setdefault(interval_s, StepLoop(interval_s))
        if fault is not None and fault.kind == "error_event":
            fault = Fault(fault.kind, after=0, message=fault.message)
        stream = Stream(connection, template, loop, self, fault)
        _after(delay_s, lambda: loop.add(stream))

    def _claimed(self, connection: Connection, request: Request, fields: dict[str, Any], fingerprint: str) -> bool:
        """Take the KV the request names; False where it can't be had, which has been answered then."""
        try:
            whose = self.ledger.claim(fields.get("kv_transfer_params") or {}, request.request_id, fingerprint)
        except KvRefused as error:
            self._answer(connection, error_response(503, str(error), "kv_load_error"))
            return False
        if whose is None:
            self.counts["recomputed"] += 1
        else:
            self.ledger.check(not scores_prompt(fields), "decode: logprobs of a prompt that was computed elsewhere")
            is_one = self.choices_have_kv or _number(fields.get("n")) == 1
            self.ledger.check(is_one, "decode: several choices of one KV")
        return True

    def _decode_other(
        self, connection: Connection, request: Request, fields: dict[str, Any], api: str, fault: Fault | None
    ) -> None:
        """/v1/responses and /v1/messages; a stream comes at once."""
        self.counts["decodes"] += 1
        script = script_of(fields, self._shape(fields, "num_tokens", self.num_tokens))
        if not self._claimed(connection, request, fields, script.fingerprint):
            return
        if fault is not None and fault.kind in BEFORE:
            self._fail_before(connection, fault)
            return
        if not _is_true(fields.get("stream")):
            num_cached = self._shape(fields, "decoder_cached_tokens", 0)
            body = other_apis.whole(api, script, request.request_id, self.model, num_cached)
            self._answer(connection, json_response(200, body))
            return
        num_cached = self._shape(fields, "decoder_cached_tokens", 0)
        told = other_apis.events(api, script, request.request_id, self.model, num_cached)
        if fault is not None:
            self._break_named(connection, api, told, fault)
            return
        self._answer(connection, STREAM_HEAD + b"".join(map(chunk, told)) + LAST_CHUNK)

    def _break_named(self, connection: Connection, api: str, told: list[bytes], fault: Fault) -> None:
        """A stream of named events that its opening, and `after` more, are all of."""
        if fault.kind in ("error_event", "error_event_mid"):
            after = 0 if fault.kind == "error_event" else fault.after
            told = [*told[: 2 + after], other_apis.error_event(api, fault.message)]
            self._answer(connection, STREAM_HEAD + b"".join(map(chunk, told)) + LAST_CHUNK)
            return
        connection.send(STREAM_HEAD + b"".join(map(chunk, told[: 2 + fault.after])))
        if fault.kind == "reset_mid":
            asyncio.get_running_loop().call_later(0.1, connection.reset)
        elif fault.kind == "close_mid":
            connection.close()
        elif fault.kind == "garbage_mid":
            asyncio.get_running_loop().call_later(0.1, connection.send, GARBAGE_CHUNK)

    def _fail_within(self, connection: Connection, response: bytes, fault: Fault) -> None:
        """A fault in the course of an answer that is not streamed."""
        if fault.kind in ("error_event", "error_event_mid"):
            self._answer(connection, error_response(500, fault.message))
        elif fault.kind == "bad_json":
            self._answer(connection, json_response(200, b'{"id": "broken", "choices": ['))
        elif fault.kind == "garbage_mid":
            head, _, body = response.partition(b"\r\n\r\n")
            head = head.partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\n"
            connection.send(head + chunk(body[:20]) + GARBAGE_CHUNK)
        else:
            connection.send(response[: len(response) - 40])
            if fault.kind == "reset_mid":
                asyncio.get_running_loop().call_later(0.02, connection.reset)
            elif fault.kind == "close_mid":
                connection.close()

    def _shape(self, fields: dict[str, Any], key: str, default: Any) -> Any:
        shape = fields.get("mock")
        return default if shape is None else shape.get(key, default)

    def state(self) -> dict[str, Any]:
        return {
            "port": self.port, "role": self.role, "epoch": self.epoch, "listening": self._server is not None,
            "num_running": len(self.running), "num_connections": len(self.connections), "counts": dict(self.counts),
        }  # fmt: skip


def _limited(request: Request, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the limit of /v1/responses under the name it has elsewhere."""
    return {**fields, "max_tokens": fields.get("max_output_tokens")} if request.path == "/v1/responses" else fields


def _number(value: Any) -> int:
    """As vLLM reads it, `"3"` and `3.0` included; 1 if absent."""
    return int(float(value or 1))


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "1.0", "yes", "on", "t", "y")


def _after(delay_s: float, action: Callable[[], None]) -> None:
    if delay_s > 0:
        asyncio.get_running_loop().call_later(delay_s, action)
    else:
        action()
