"""Layerwise push between two connectors as each vLLM drives them, over real sidecars and a real metaserver's socket."""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch

from engine_adapter.vllm_connector.settings import ConnectorStartError
from tests.unit.engine_adapter.vllm_connector import fake_vllm
from tests.unit.engine_adapter.vllm_connector.fake_vllm import VERSIONS, Role, connector_under, request
from tests.unit.engine_adapter.vllm_connector.test_connector import NUM_BLOCKS, Half, scheduled, vllm_config

ID = "cmpl-r-0"


@pytest.fixture
def posted() -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """A metaserver's URL, and what is posted there."""
    got: queue.Queue[dict[str, Any]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.put(orjson.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/metaserver", got
    server.shutdown()
    thread.join()
    server.server_close()


Posted = tuple[str, queue.Queue[dict[str, Any]]]


def blocks(*ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


class Pair:
    """A prefiller and a decoder that has landed blocks 4, 6 and 7 for a prompt of 40 tokens."""

    def __init__(self, module: Any, version: tuple[int, int], posted: Posted) -> None:
        self.version = version
        self.prefiller = Half(module, version, "p", "kv_producer", contract="layerwise")
        self.decoder = Half(module, version, "d", "kv_consumer", contract="layerwise", push_timeout_s=20)
        url, got = posted
        wanted = request(ID, {"do_remote_prefill": True, "metaserver": url})
        assert self.decoder.scheduler.get_num_new_matched_tokens(wanted, 0) == (40, True)
        self.decoder.scheduler.update_state_after_alloc(wanted, blocks(4, 6, 7), 40)
        self.decoder.step()
        self.params = got.get(timeout=20)
        self.asked = request(ID, self.params)
        assert self.params["request_id"] == ID
        assert self.prefiller.scheduler.get_num_new_matched_tokens(self.asked, 0) == (0, False)
        self.prefiller.scheduler.update_state_after_alloc(self.asked, blocks(1, 2, 3), 0)

    def forward(self, output: Any, *layers: str) -> set[str]:
        """One step of the prefiller that runs these layers; what it reports as sent."""
        worker, scheduler = self.prefiller.worker, self.prefiller.scheduler
        worker.bind_connector_metadata(scheduler.build_connector_meta(output))
        for layer in layers:
            worker.wait_for_layer_load(layer)
            worker.save_kv_layer(layer, self.prefiller.kv[layer], object())
        worker.start_load_kv(None)
        worker.wait_for_save()
        worker.bind_connector_metadata(None)
        return set(self.prefiller.step()[0])

    def same(self) -> bool:
        return all(
            torch.equal(tensor[here], self.prefiller.kv[layer][there])
            for layer, tensor in self.decoder.kv.items()
            for here, there in ((4, 1), (6, 2), (7, 3))
        )

    def close(self) -> None:
        self.decoder.close()
        self.prefiller.close()


LAYERS = ("layers.0", "layers.1")


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: ".".join(map(str, version)))
def test_kv_is_pushed_by_chunks_and_layers(version: tuple[int, int], posted: Posted) -> None:
    with connector_under(version) as module:
        pair = Pair(module, version, posted)
        try:
            assert not pair.forward(scheduled_for(version, 0, 32, [1, 2]), *LAYERS)
            assert not pair.forward(scheduled_for(version, 32, 8, [3]), *LAYERS)
            pair.asked.status.name = "FINISHED_LENGTH_CAPPED"
            assert pair.prefiller.finish(pair.asked, [1, 2, 3]) == (True, None)
            assert pair.decoder.until(lambda done: done[1] == {ID} and not done[2])
            assert pair.same()
            assert pair.prefiller.until(lambda done: done[0] == {ID})
            assert not pair.prefiller.step()[0] and not pair.decoder.step()[1]
        finally:
            pair.close()


def scheduled_for(version: tuple[int, int], num_computed: int, num_tokens: int, block_ids: list[int]) -> Any:
    """`scheduled`, of this request."""
    output = scheduled(version, num_computed, num_tokens, block_ids)
    for new in output.scheduled_new_reqs:
        new.req_id = ID
    output.scheduled_cached_reqs.req_ids = [ID] * len(output.scheduled_cached_reqs.req_ids)
    output.num_scheduled_tokens = {ID: num_tokens}
    return output


def test_a_preempted_push_is_done_again_from_other_blocks(posted: Posted) -> None:
    version = (0, 32)
    with connector_under(version) as module:
        pair = Pair(module, version, posted)
        try:
            pair.forward(scheduled_for(version, 0, 40, [5, 6, 7]), "layers.0")
            pair.asked.status.name = "PREEMPTED"
            pair.forward(None)  # blocks 5, 6 and 7 are others' now
            pair.asked.status.name = "RUNNING"
            again = scheduled_for(version, 0, 40, [1, 2, 3])
            pair.forward(again, *LAYERS)
            pair.asked.status.name = "FINISHED_LENGTH_CAPPED"
            assert pair.prefiller.finish(pair.asked, [1, 2, 3]) == (True, None)
            assert pair.decoder.until(lambda done: done[1] == {ID} and not done[2])
            assert pair.same()
            assert pair.prefiller.until(lambda done: done[0] == {ID})
        finally:
            pair.close()


def test_an_aborted_prefill_and_an_aborted_decode_are_reported_once(posted: Posted) -> None:
    version = (0, 32)
    with connector_under(version) as module:
        pair = Pair(module, version, posted)
        try:
            pair.forward(scheduled_for(version, 0, 40, [1, 2, 3]), "layers.0")
            pair.asked.status.name = "FINISHED_ABORTED"
            delayed, params = pair.prefiller.finish(pair.asked, [1, 2, 3])
            assert delayed and params is None
            assert pair.prefiller.until(lambda done: done[0] == {ID})
            left = request(ID, {"do_remote_prefill": True, "metaserver": posted[0]}, status="FINISHED_ABORTED")
            assert pair.decoder.finish(left, [4, 6, 7]) == (False, None)
            assert pair.decoder.until(lambda done: done[1] == {ID})
            assert not pair.decoder.step()[1] and not pair.prefiller.step()[0]
        finally:
            pair.close()


def test_what_cannot_push_says_so() -> None:
    connector = importlib.import_module("engine_adapter.vllm_connector.connector")
    two = fake_vllm.config(contract="layerwise", tensor_parallel_size=2)
    with pytest.raises(ConnectorStartError, match="--tensor-parallel-size is 2: use pull"):
        connector.BatonConnector(two, Role.WORKER, fake_vllm.caches())
    staged = vllm_config("s", "kv_both", memory="staging", contract="layerwise")
    worker = connector.BatonConnector(staged, Role.WORKER, fake_vllm.caches())
    try:
        with pytest.raises(ConnectorStartError, match="memory is staging: take contract out"):
            worker.register_kv_caches({"layers.0": torch.randn(NUM_BLOCKS, 2, 16, 16)})
    finally:
        worker.shutdown()


def test_vllm_is_asked_for_graphs_with_hooks_between_their_pieces() -> None:
    connector = importlib.import_module("engine_adapter.vllm_connector.connector").BatonConnector
    assert connector.requires_piecewise_for_cudagraph({"contract": "layerwise"})
    assert not connector.requires_piecewise_for_cudagraph({})
    assert not connector.requires_piecewise_for_cudagraph({"contract": "layerwise", "role": "decode"})
