"""Mock engines of the contracts whose legs meet under a name the proxy mints: vLLM's mooncake, sglang, p2p-nccl.

Each is strict about what it is told (kv-contracts sections 2.2, 2.7, 2.8). The KV of a prefill is an entry of the one
ledger, so that who takes it, with which request id and for which prompt, is checked there as it is for `pull`. An
engine's bootstrap or KV port is its HTTP port.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from bench import mock_other_apis as other_apis
from bench.mock_answers import scripts_of
from bench.mock_faults import Fault
from bench.mock_http import Connection, Request, error_response, json_response
from bench.mock_instance import MockInstance, _after
from bench.mock_ledger import KvLedger

Fields = dict[str, Any]
_P2P_ID = re.compile(r"___prefill_addr_(.*):(\d+)___decode_addr_(.*):(\d+)_([0-9a-f]{32})$")
MAX_ROOM = 2**63 - 1


@dataclass(eq=False, slots=True)
class Meeting:
    """What is known under one name: the KV once it is there, who waits for it, and who is told when it was taken."""

    name: str
    prefill: Fields | None = None
    decode: Fields | None = None
    kv: Fields | None = None
    start_decode: Callable[[Fields], None] | None = None
    on_taken: Callable[[], None] | None = None
    decoder_left: bool = False


@dataclass
class Meetings:
    """Shared by all instances of a process. `engines` are the engine ids alive, with the port of each."""

    ledger: KvLedger
    by_name: dict[str, Meeting] = field(default_factory=dict)
    engines: dict[str, int] = field(default_factory=dict)

    def named(self, name: str) -> Meeting:
        return self.by_name.setdefault(name, Meeting(name))

    def come(self, meeting: Meeting, leg: str, told: Fields) -> None:
        """One of the two legs, each at most once but for a decoder that takes what another left."""
        self.ledger.check(leg == "decode" or meeting.prefill is None, f"{leg}: {meeting.name} was used before")
        setattr(meeting, leg, told)

    def arrive(self, meeting: Meeting, kv: Fields) -> None:
        meeting.kv = kv
        if meeting.decoder_left and meeting.start_decode is None:
            self.ledger.release(kv)
        else:
            self.hand_over(meeting)

    def hand_over(self, meeting: Meeting) -> None:
        if meeting.kv is not None and meeting.start_decode is not None:
            start, meeting.start_decode = meeting.start_decode, None
            start(meeting.kv)
            if meeting.on_taken is not None:
                meeting.on_taken()


@dataclass(eq=False)
class PairInstance(MockInstance):
    meetings: Meetings = field(kw_only=True)
    num_ranks: int = field(default=1, kw_only=True)
    answers_when_taken = False
    evicts_after_s = 0.0
    """How long KV that nobody takes is kept, where the proxy has no way to have it dropped."""

    def told_prefill(self, request: Request, fields: Fields) -> Meeting | None:
        """Check the prefill leg; None refuses it."""
        raise NotImplementedError

    def told_decode(self, request: Request, fields: Fields) -> Meeting | str | None:
        """Check the decode leg; None: it is for this engine alone; a string: what is wrong, for a 500."""
        raise NotImplementedError

    def _prefill(
        self, connection: Connection, request: Request, fields: Fields, chat: bool, fault: Fault | None
    ) -> None:
        self.counts["prefills"] += 1
        meeting = self.told_prefill(request, fields)
        if meeting is None:
            self._answer(connection, error_response(400, "not what this contract has"))
            return
        script = scripts_of(fields)[0]
        first = scripts_of(fields, 1)[0]
        num_cached = self._shape(fields, "cached_tokens", 0)
        told = other_apis.prefill_answer(request.path, first, chat, request.request_id, self.model, num_cached)
        body = json_response(200, told)

        def finish() -> None:
            if connection.gone:
                return
            if fault is not None:
                self._fail_within(connection, body, fault)
                return
            producer = f"{self.host}:{self.port}"
            kv = self.ledger.hand_out(
                producer, self.epoch, request.request_id, script.fingerprint, script.num_prompt_tokens
            )
            if self.evicts_after_s:
                _after(self.evicts_after_s, lambda: self._evict(kv))
            if self.answers_when_taken:
                meeting.on_taken = lambda: self._answer(connection, body)
                connection.on_lost = lambda: self._left_behind(connection, kv)
                self.meetings.arrive(meeting, kv)
            else:
                self.meetings.arrive(meeting, kv)
                _after(self._shape(fields, "answer_s", 0), lambda: self._answer(connection, body))

        _after(self._shape(fields, "prefill_s", self.pace.prefill_s), finish)

    def _evict(self, kv: Fields) -> None:
        if kv["remote_request_id"] in self.ledger.outstanding():
            self.ledger.void_one(kv)

    def _left_behind(self, connection: Connection, kv: Fields) -> None:
        self.aborted(connection)
        self.ledger.release(kv)

    def _decode(
        self, connection: Connection, request: Request, fields: Fields, chat: bool, fault: Fault | None
    ) -> None:
        alone = super()._decode
        self._serve(connection, request, fields, lambda asked, told: alone(connection, asked, told, chat, fault))

    def _decode_other(
        self, connection: Connection, request: Request, fields: Fields, api: str, fault: Fault | None
    ) -> None:
        alone = super()._decode_other
        self._serve(connection, request, fields, lambda asked, told: alone(connection, asked, told, api, fault))

    def _serve(
        self, connection: Connection, request: Request, fields: Fields, alone: Callable[[Request, Fields], None]
    ) -> None:
        meeting = self.told_decode(request, fields)
        if meeting is None:
            alone(request, fields)
            return
        if isinstance(meeting, str):
            self._answer(connection, error_response(500, meeting))
            return
        request_id = request.request_id.removesuffix("-reclaim").encode()  # one token, for KV that was left
        original = replace(request, headers={**request.headers, b"x-request-id": request_id})

        def start(kv: Fields) -> None:
            connection.on_lost = lambda: self.aborted(connection)
            alone(original, {**fields, "kv_transfer_params": kv})

        def left() -> None:
            self.aborted(connection)
            if meeting.start_decode is start:
                meeting.start_decode, meeting.decoder_left = None, True

        self.counts["waits"] += 1
        connection.on_lost = left
        meeting.start_decode = start
        self.meetings.hand_over(meeting)


@dataclass(eq=False)
class MooncakeInstance(PairInstance):
    """`GET /query` on its own port names an engine a rank, with other ids after a restart."""

    async def start(self) -> None:
        await super().start()
        if self.role == "prefill":
            stale = [engine_id for engine_id, port in self.meetings.engines.items() if port == self.port]
            for engine_id in stale:
                del self.meetings.engines[engine_id]
            self.meetings.engines.update({self._engine_id(rank): self.port for rank in range(self.num_ranks)})

    def _engine_id(self, rank: int) -> str:
        return f"engine-{self.port}-{self.epoch}-{rank}"

    def handle(self, connection: Connection, request: Request) -> None:
        if request.path == "/query" and self.role == "prefill":
            self.counts["queries"] += 1
            ranks = {
                str(rank): {"engine_id": self._engine_id(rank), "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}}
                for rank in range(self.num_ranks)
            }
            connection.answer(json_response(200, orjson.dumps(ranks)))
        else:
            super().handle(connection, request)

    def told_prefill(self, request: Request, fields: Fields) -> Meeting | None:
        check = self.ledger.check
        params = fields.get("kv_transfer_params") or {}
        check(set(params) == {"do_remote_decode", "do_remote_prefill", "transfer_id"}, f"prefill: told {params}")
        check(params.get("do_remote_decode") is True, "prefill: do_remote_decode is not true")
        check(params.get("do_remote_prefill") is False, "prefill: do_remote_prefill is not false")
        _one_token(check, request.path, fields)
        rank = request.headers.get(b"x-data-parallel-rank", b"").decode()
        check(rank.isdigit() and int(rank) < self.num_ranks, f"prefill: X-data-parallel-rank is {rank!r}")
        try:
            name = str(uuid.UUID(params.get("transfer_id")))
        except (ValueError, TypeError, AttributeError):
            self.ledger.violation(f"prefill: transfer_id is {params.get('transfer_id')!r}")
            return None
        meeting = self.meetings.named(name)
        self.meetings.come(meeting, "prefill", {"port": self.port, "rank": rank, "id": request.request_id})
        self.counts[f"rank_{rank}"] += 1
        _agree(check, meeting)
        return meeting

    def told_decode(self, request: Request, fields: Fields) -> Meeting | str | None:
        params = fields.get("kv_transfer_params")
        if not params:
            return None
        check = self.ledger.check
        known = {
            "do_remote_decode", "do_remote_prefill", "transfer_id", "remote_engine_id", "remote_bootstrap_addr"
        }  # fmt: skip
        check(set(params) == known, f"decode: told {params}")
        check(params.get("do_remote_prefill") is True, "decode: do_remote_prefill is not true")
        check(params.get("do_remote_decode") is False, "decode: do_remote_decode is not false")
        engine_id = str(params.get("remote_engine_id"))
        port = self.meetings.engines.get(engine_id)
        if port is None:
            self.counts["unknown_engine"] += 1
            return f"no engine {engine_id}"
        address = params.get("remote_bootstrap_addr")
        check(address == f"http://{self.host}:{port}", f"decode: remote_bootstrap_addr is {address}, port {port}")
        meeting = self.meetings.named(str(params.get("transfer_id")))
        rank = engine_id.rpartition("-")[2]
        self.meetings.come(meeting, "decode", {"port": port, "rank": rank, "id": request.request_id})
        if 1 not in (
            fields.get("max_tokens"),
            fields.get("max_output_tokens"),
        ):  # one token only: it takes KV that was left
            _agree(check, meeting)
        return meeting

    def abandoned(self, request: Request) -> None:
        """As vLLM does since 0.32 (`notify_kv_transfer_request_rejected`): the prefiller is told all the same."""
        params = orjson.loads(request.body or b"{}").get("kv_transfer_params") or {}
        if self.role == "decode" and (name := params.get("transfer_id")):
            meeting = self.meetings.named(name)
            meeting.decoder_left = True
            if meeting.kv is not None and meeting.start_decode is None:
                self.ledger.release(meeting.kv)


@dataclass(eq=False)
class SglangInstance(PairInstance):
    answers_when_taken = True

    def handle(self, connection: Connection, request: Request) -> None:
        if request.path == "/get_server_info":
            mode = {"disaggregation_mode": self.role, "disaggregation_bootstrap_port": self.port}
            connection.answer(json_response(200, orjson.dumps(mode)))
        else:
            super().handle(connection, request)

    def told_prefill(self, request: Request, fields: Fields) -> Meeting | None:
        self.ledger.check(
            fields.get("bootstrap_port") == self.port, f"prefill: bootstrap_port is {fields.get('bootstrap_port')}"
        )
        return self._room("prefill", fields)

    def told_decode(self, request: Request, fields: Fields) -> Meeting | str | None:
        return self._room("decode", fields) or "no room"

    def _room(self, leg: str, fields: Fields) -> Meeting | None:
        check, room = self.ledger.check, fields.get("bootstrap_room")
        check(fields.get("bootstrap_host") == self.host, f"{leg}: bootstrap_host is {fields.get('bootstrap_host')}")
        check("kv_transfer_params" not in fields, f"{leg}: kv_transfer_params present")
        if type(room) is not int or not 0 <= room <= MAX_ROOM:
            self.ledger.violation(f"{leg}: bootstrap_room is {room!r}")
            return None
        meeting = self.meetings.named(f"room {room}")
        self.meetings.come(meeting, leg, fields)
        _agree(check, meeting)
        return meeting


@dataclass(eq=False)
class P2pNcclInstance(PairInstance):
    evicts_after_s = 2.0
    choices_have_kv = True  # their ids are derived alike on both legs

    def handle(self, connection: Connection, request: Request) -> None:
        if request.path == "/server_info":
            config = {"vllm_config": "kv_transfer_config=KVTransferConfig(kv_connector='P2pNcclConnector')"}
            connection.answer(json_response(200, orjson.dumps(config)))
        else:
            super().handle(connection, request)

    def told_prefill(self, request: Request, fields: Fields) -> Meeting | None:
        check = self.ledger.check
        limit = fields.get("max_output_tokens" if request.path == "/v1/responses" else "max_tokens")
        check(limit == 1, f"prefill: max_tokens is {limit}")
        check(fields.get("stream") is False, "prefill: streamed")
        return self._addressed("prefill", request, fields)

    def told_decode(self, request: Request, fields: Fields) -> Meeting | str | None:
        meeting = self._addressed("decode", request, fields)
        if meeting is not None and meeting.kv is None:
            self.ledger.violation("decode: came before its prefill had ended, and stalls the step of all others")
        return meeting or "the request id has no addresses"

    def _addressed(self, leg: str, request: Request, fields: Fields) -> Meeting | None:
        found = _P2P_ID.fullmatch(request.request_id)
        self.ledger.check("kv_transfer_params" not in fields, f"{leg}: kv_transfer_params present")
        if found is None:
            self.ledger.violation(f"{leg}: request id {request.request_id!r} has no addresses")
            return None
        host, port = (found[1], found[2]) if leg == "prefill" else (found[3], found[4])
        self.ledger.check((host, port) == (self.host, str(self.port)), f"{leg}: addressed as {host}:{port}")
        meeting = self.meetings.named(request.request_id)
        self.meetings.come(meeting, leg, {"id": request.request_id})
        _agree(self.ledger.check, meeting)
        return meeting


def _one_token(check: Callable[[bool, str], None], path: str, fields: Fields) -> None:
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    least = None if path == "/v1/messages" else 1  # which has no field to force a token
    check(fields.get(limit) == 1 and fields.get("min_tokens") == least, "prefill: not one forced token")
    check(fields.get("max_completion_tokens", 1) == 1, "prefill: max_completion_tokens is not 1")
    check(fields.get("stream") is False and "stream_options" not in fields, "prefill: streamed")


def _agree(check: Callable[[bool, str], None], meeting: Meeting) -> None:
    """Both legs were told the same."""
    if meeting.prefill is not None and meeting.decode is not None:
        check(meeting.prefill == meeting.decode, f"the legs of {meeting.name} differ: {meeting}")
