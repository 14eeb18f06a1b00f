"""Prefillers and decoders of the policy simulator: how long an engine takes, by discrete events.

The numbers are of the size a 70B model in 8 bits has on one node of current accelerators; no policy knows them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from itertools import count

from bench.simulated_requests import CHUNK_TOKENS, Request

PREFILL_TOKENS_PER_S = 20_000.0
PREFILL_STEP_S = 0.015  # whatever a step computes
PREFILL_STEP_TOKENS = 8192  # the engine's token budget; a longer prompt takes several steps
ATTENTION_TOKENS = 40_000.0  # context at which a token costs twice as much
PREFIX_CACHE_CHUNKS = 2048

DECODE_STEP_S = 0.018
DECODE_STREAM_S = 0.0004
DECODE_KV_TOKEN_S = 0.25e-6
DECODE_KV_TOKENS = 96_000
DECODE_STREAMS = 256
MAX_STEPS_AN_EVENT = 32  # steps of a decode batch that does not change are taken together

TRANSFER_S = 0.005
TRANSFER_TOKEN_S = 13e-6  # 160 KB of KV a token at 12 GB/s


class Clock:
    """`now`, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self.at(self.now + seconds, act)

    def run(self) -> None:
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act()


Told = Callable[[Request, bool], None]
"""Told that a request is done with an instance, and whether it went well."""


def compute_s(begun: int, tokens: int) -> float:
    """Of `tokens` tokens of a prompt behind `begun` others."""
    return tokens * (1 + (begun + tokens / 2) / ATTENTION_TOKENS) / PREFILL_TOKENS_PER_S


class Prefiller:
    """First come, first served, several prompts a step up to the token budget, prefixes cached."""

    def __init__(self, clock: Clock, slowness: float) -> None:
        self._clock = clock
        self._slowness = slowness
        self._queue: deque[tuple[Request, int, int, Told]] = deque()  # request, tokens done, tokens to do
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._in_step: list[tuple[Request, Told]] = []
        self._stepping = False
        self._life = 0
        self.down = False
        self.busy_s = 0.0

    def send(self, request: Request, told: Told) -> None:
        self._queue.append((request, self._num_cached(request), request.prompt_tokens, told))
        if not self._stepping:
            self._step()

    def _num_cached(self, request: Request) -> int:
        num_chunks = 0
        for key in request.prefix.keys:
            if key not in self._cache:
                break
            num_chunks += 1
        return min(num_chunks * CHUNK_TOKENS, request.prompt_tokens - 1)

    def _step(self) -> None:
        budget, seconds = PREFILL_STEP_TOKENS, PREFILL_STEP_S
        done: list[tuple[Request, Told]] = []
        while self._queue and budget:
            request, begun, whole, told = self._queue.popleft()
            tokens = min(whole - begun, budget)
            budget -= tokens
            seconds += compute_s(begun, tokens)
            if begun + tokens < whole:
                self._queue.appendleft((request, begun + tokens, whole, told))
                break
            done.append((request, told))
        self._stepping = bool(done or self._queue)
        if self._stepping:
            self._in_step = done
            self.busy_s += seconds * self._slowness
            self._clock.after(seconds * self._slowness, partial(self._stepped, self._life, done))

    def _stepped(self, life: int, done: list[tuple[Request, Told]]) -> None:
        if life != self._life:
            return
        self._in_step = []
        for request, _ in done:
            for key in request.prefix.keys:
                self._cache[key] = None
                self._cache.move_to_end(key)
        while len(self._cache) > PREFIX_CACHE_CHUNKS:
            self._cache.popitem(last=False)
        self._step()
        for request, told in done:
            told(request, True)

    def crash(self) -> None:
        self._life += 1
        self.down, self._stepping = True, False
        lost = [*self._in_step, *((request, told) for request, _, _, told in self._queue)]
        self._queue.clear()
        self._cache.clear()
        self._in_step = []
        for request, told in lost:
            told(request, False)


class _Stream:
    __slots__ = ("ends_at_step", "first", "request", "told")

    def __init__(self, request: Request, first: Callable[[], None], told: Told) -> None:
        self.request = request
        self.first = first
        self.told = told
        self.ends_at_step = 0

    @property
    def kv_tokens(self) -> int:
        return self.request.prompt_tokens + self.request.output_tokens


class Decoder:
    """Continuous batching: a stream joins between two steps, if its KV fits; a step takes longer the more there is."""

    def __init__(self, clock: Clock, slowness: float) -> None:
        self._clock = clock
        self._slowness = slowness
        self._life = 0
        self.down = False
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[_Stream] = deque()
        self._pulling: dict[_Stream, None] = {}
        self._joining: list[_Stream] = []
        self._batch: list[tuple[int, int, _Stream]] = []  # a heap by the step a stream ends with
        self._order = count()
        self._reserved_kv = 0  # of all that are admitted, to their ends
        self._kv = 0  # of the batch, now
        self._num_steps = 0
        self._began_at, self._step_s, self._stride = 0.0, 0.0, 0  # of the steps taken together; no stride: idle
        self._version = 0

    def send(self, request: Request, first: Callable[[], None], told: Told) -> None:
        """`first` is called with the first token, `told` with the end."""
        self._waiting.append(_Stream(request, first, told))
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            num_admitted = len(self._pulling) + len(self._joining) + len(self._batch)
            kv_tokens = self._waiting[0].kv_tokens
            if num_admitted and (num_admitted >= DECODE_STREAMS or self._reserved_kv + kv_tokens > DECODE_KV_TOKENS):
                return
            stream = self._waiting.popleft()
            self._reserved_kv += kv_tokens
            self._pulling[stream] = None
            seconds = TRANSFER_S + stream.request.prompt_tokens * TRANSFER_TOKEN_S
            self._clock.after(seconds, partial(self._pulled, self._life, stream))

    def _pulled(self, life: int, stream: _Stream) -> None:
        if life != self._life:
            return
        del self._pulling[stream]
        self._joining.append(stream)
        if not self._stride:
            self._take_steps()
            return
        step = int((self._clock.now - self._began_at) / self._step_s) + 1  # it joins where this step ends
        if step < self._stride:
            self._end_stride_after(step)

    def _take_steps(self) -> None:
        """As many as nothing changes in. A stream that joins gets its first token, so that is a stride of one step."""
        joined = bool(self._joining)
        for stream in self._joining:
            stream.ends_at_step = self._num_steps + stream.request.output_tokens
            self._kv += stream.request.prompt_tokens
            heapq.heappush(self._batch, (stream.ends_at_step, next(self._order), stream))
        self._new, self._joining = self._joining, []
        self._stride = 0
        if self._batch:
            seconds = DECODE_STEP_S + len(self._batch) * DECODE_STREAM_S + self._kv * DECODE_KV_TOKEN_S
            self._began_at, self._step_s = self._clock.now, seconds * self._slowness
            steps = 1 if joined else min(self._batch[0][0] - self._num_steps, MAX_STEPS_AN_EVENT)
            self._end_stride_after(steps)

    def _end_stride_after(self, steps: int) -> None:
        self._stride = steps
        self._version += 1
        self._clock.at(self._began_at + steps * self._step_s, partial(self._stepped, self._life, self._version))

    def _stepped(self, life: int, version: int) -> None:
        if life != self._life or version != self._version:
            return
        self._num_steps += self._stride
        self._kv += self._stride * len(self._batch)
        new, ended = self._new, []
        while self._batch and self._batch[0][0] <= self._num_steps:
            stream = heapq.heappop(self._batch)[2]
            self._kv -= stream.kv_tokens
            self._reserved_kv -= stream.kv_tokens
            ended.append(stream)
        self._admit()
        self._take_steps()
        for stream in new:
            stream.first()
        for stream in ended:
            stream.told(stream.request, True)

    def crash(self) -> None:
        lost = [*self._waiting, *self._pulling, *self._joining, *(stream for _, _, stream in self._batch)]
        self._life += 1
        self.down = True
        self._reset()
        for stream in lost:
            stream.told(stream.request, False)
