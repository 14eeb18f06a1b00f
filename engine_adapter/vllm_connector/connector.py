"""The class that vLLM loads. One object in the scheduler, one in each worker; each is one of the two sides."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_adapter.device import Progress
from engine_adapter.sidecar_link import SidecarLink
from engine_adapter.sidecar_process import OwnSidecar, SidecarCommand, SidecarStartError
from engine_adapter.sidecar_thread import SidecarThread
from engine_adapter.vllm_connector import compat
from engine_adapter.vllm_connector.compat import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from engine_adapter.vllm_connector.kv_memory import KvMemory
from engine_adapter.vllm_connector.layout import KvTensors, axes_of, order_of, planes_of, tensors_of
from engine_adapter.vllm_connector.metadata import BatonMetadata
from engine_adapter.vllm_connector.scheduler_link import SchedulerLink
from engine_adapter.vllm_connector.scheduler_push import SchedulerPush
from engine_adapter.vllm_connector.scheduler_side import Finished, SchedulerSide
from engine_adapter.vllm_connector.scheduler_store import SchedulerStore
from engine_adapter.vllm_connector.settings import (
    ConnectorSettings,
    ConnectorStartError,
    check_ports,
    listen_of,
    settings_from,
    socket_of,
)
from engine_adapter.vllm_connector.staged_offers import StagedOffers
from engine_adapter.vllm_connector.store_settings import StoreSettings, sidecar_flags
from engine_adapter.vllm_connector.worker_push import LayerMarks, WorkerLandings
from engine_adapter.vllm_connector.worker_side import FENCE_GRACE_S, WorkerSide
from sidecar.errors import SidecarError
from sidecar.protocol import KvLayout

logger = logging.getLogger(__name__)


class BatonConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """KV hand-off by pull and by layerwise push over Baton's sidecars; see settings.py for what it can be told."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        """Raises ConnectorStartError on anything that can't work."""
        compat.init_base(self, vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = vllm_config
        self._caches = kv_cache_config
        self._settings = settings_from(transfer.kv_role, transfer.kv_connector_extra_config or {})
        check_ports(self._settings, vllm_config.parallel_config.tensor_parallel_size)
        self._block_size = compat.block_size(vllm_config, kv_cache_config)
        _refuse_what_cannot_work(vllm_config, kv_cache_config, self._settings)
        if self._settings.store is not None and (fault := compat.store_fault(vllm_config, kv_cache_config)):
            raise ConnectorStartError(fault)
        compat.show_log_lines(self._settings.log_level)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._marks: LayerMarks | None = None
        self._memory: KvMemory | None = None
        self._own: OwnSidecar | SidecarThread | None = None
        self._failed_blocks: set[int] = set()
        self._may_wait = False
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._join_sidecars(transfer.kv_role)

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, KvTensors]) -> None:
        """Give the KV cache, or a buffer that stands for it, to this worker's sidecar. Raises ConnectorStartError."""
        rank = compat.tensor_parallel_rank()
        tensors = tensors_of(kv_caches)
        num_blocks = compat.num_blocks(self._config, self._caches)
        memory = KvMemory(
            self._settings, self._config.kv_transfer_config.kv_role, [tensor for _, tensor in tensors],
            lambda position: self._layout(kv_caches, planes_of(tensors, num_blocks, position), num_blocks, rank),
        )  # fmt: skip
        socket_path = self._start_sidecar(rank, in_process=memory.choice.provider.in_process)
        news = threading.Event()
        link = SidecarLink(socket_path, memory.enter, news.set, fence_grace_s=FENCE_GRACE_S)
        try:
            link.start()
        except (SidecarError, OSError) as error:
            raise ConnectorStartError(
                f"no KV transfer through the sidecar at {socket_path} ({error}): start pd-sidecar there, or leave "
                "kv_connector_extra_config.sidecar at auto"
            ) from error
        self._memory = memory
        if self._settings.store is not None and memory.choice.provider.name != "shm":
            raise ConnectorStartError(
                f"kv_connector_extra_config.store needs KV that the sidecar reaches itself, and memory is "
                f"{memory.choice.provider.name}: take store out, or run vLLM where memory can be shm"
            )
        store_timeout_s = (self._settings.store or StoreSettings()).load_timeout_s
        landings = self._take_pushes(memory, link, list(kv_caches), news) if self._pushes else None
        self._worker = WorkerSide(
            memory.link_of(link), rank, self._settings.pull_timeout_s, news, store_timeout_s, landings
        )
        logger.info(
            "kv_pool_shared rank=%d memory=%s bytes=%d blocks=%d socket=%s",
            rank,
            memory.choice.provider.name,
            memory.pool.num_bytes,
            num_blocks,
            socket_path,
        )

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Called before the forward: which prompts it computes for a decoder that is told layer by layer."""
        super().bind_connector_metadata(connector_metadata)
        if self._marks is not None and isinstance(connector_metadata, BatonMetadata):
            self._marks.begin(connector_metadata.marks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's loads; they end in later steps."""
        # Without a forward pass in this step there is time to wait for news.
        self._may_wait = getattr(forward_context, "attn_metadata", forward_context) is None
        worker, meta = self._worker, self._connector_metadata
        if worker is not None and isinstance(meta, BatonMetadata):
            worker.begin(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request is scheduled once its load has ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """The layer's keys and values lie in the pool, where decoders read them."""
        if self._marks is not None:
            self._marks.layer_written(layer_name)

    def wait_for_save(self) -> None:
        """Copy the blocks of prompts that this step has completed, where KV is staged; else nothing: decoders read the
        pool itself, and the prefix store is given the blocks of finished requests."""
        meta = self._connector_metadata
        if self._memory is not None and isinstance(meta, BatonMetadata):
            self._memory.stage(meta.stages)
        if self._marks is not None:
            self._marks.step_ended()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Sent and received ids, for vLLM before 0.32, which asks for bad blocks next."""
        if self._worker is None:
            return None, None
        ended = self._worker.poll(self._may_wait)
        if ended.failed and not compat.REPORTS_LOAD_ERRORS:
            raise RuntimeError(f"vLLM {compat.VERSION_TEXT} knows no failed KV load, and {sorted(ended.failed)} failed")
        self._failed_blocks |= ended.failed_blocks | ended.missing_blocks
        return ended.sent, ended.received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """The same from vLLM 0.32 on, with failed loads by id."""
        if self._worker is None:
            return compat.TransferResults()
        ended = self._worker.poll(self._may_wait)
        self._failed_blocks |= ended.missing_blocks
        return compat.TransferResults(
            finished_sending=ended.sent, finished_recving=ended.received, failed_recving=ended.failed
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed loads, each once."""
        blocks, self._failed_blocks = self._failed_blocks, set()
        return blocks

    def shutdown(self) -> None:
        """Let go of the sidecars, and end one that is ours."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()
        if self._own is not None:
            self._own.stop()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of a whole forward runs no hook between its layers (0.18 and later ask); a decoder needs none."""
        return extra_config.get("contract") == "layerwise" and extra_config.get("role") != "decode"

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See SchedulerSide.num_new_matched_tokens."""
        return self._scheduling.num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See SchedulerSide.allocated."""
        block_ids = blocks.get_block_ids()[0] if num_external_tokens > 0 else []
        self._scheduling.allocated(request, block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> BatonMetadata:
        """See SchedulerSide.next_meta."""
        idle = getattr(scheduler_output, "total_num_scheduled_tokens", 1) == 0
        return self._scheduling.next_meta(scheduler_output, idle=idle)

    def on_new_request(self, request: Any) -> None:
        """See SchedulerSide.new_request."""
        self._scheduling.new_request(request)

    def update_connector_output(self, connector_output: Any) -> None:
        """See SchedulerSide.received and sent."""
        self._scheduling.sent(connector_output.finished_sending or ())
        self._scheduling.received(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> Finished:
        """See SchedulerSide.finished."""
        return self._scheduling.finished(request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> Finished:
        """The same, called where the hybrid KV cache manager is on; there is one group."""
        return self._scheduling.finished(request, block_ids[0])

    def reset_cache(self) -> bool | None:
        """The weights may have changed: nothing that this engine kept or finds until now is loaded any more."""
        if self._scheduler is None or self._settings.store is None:
            return None
        self._scheduler.forget_stored(secrets.token_hex(16))
        return True

    @property
    def _scheduling(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler's method was called on a worker's connector"
        return self._scheduler

    def _join_sidecars(self, kv_role: str) -> SchedulerSide:
        links = []
        staged = StagedOffers(kv_role, self._block_size)
        for rank in range(self._config.parallel_config.tensor_parallel_size):
            link = SchedulerLink(str(self._socket(rank)), staged)
            link.start_later()
            links.append(link)
        store = None
        if self._settings.store is not None:
            store = SchedulerStore(links, self._block_size, compat.computation(self._config))
        lease_s = self._settings.lease_s
        fault = "" if self._pushes else 'put "contract": "layerwise" into kv_connector_extra_config for pushed KV'
        push = SchedulerPush(links, kv_role, self._block_size, lease_s, fault)
        return SchedulerSide(links, kv_role, self._block_size, lease_s, staged=staged, store=store, push=push)

    @property
    def _pushes(self) -> bool:
        return self._settings.contract == "layerwise"

    def _take_pushes(
        self, memory: KvMemory, link: SidecarLink, layers: list[str], news: threading.Event
    ) -> WorkerLandings:
        """Raises ConnectorStartError where the sidecar does not reach the KV itself."""
        if memory.choice.stages:
            raise ConnectorStartError(
                f"kv_connector_extra_config.contract layerwise needs KV that the sidecar reaches itself, and memory is "
                f"{memory.choice.provider.name}: take contract out, or run vLLM where memory can be shm or device_ipc"
            )
        self._marks = LayerMarks(
            link, layers, memory.layout, Progress(memory.choice.place.device),
            by_layer=compat.hooks_are_whole(self._config),
        )  # fmt: skip
        return WorkerLandings(link, self._block_size, self._settings.push_timeout_s, news)

    def _socket(self, rank: int) -> Path:
        engine_id = f"{self._config.kv_transfer_config.engine_id}/dp{self._config.parallel_config.data_parallel_rank}"
        return socket_of(self._settings, engine_id, rank, os.getuid())

    def _start_sidecar(self, rank: int, *, in_process: bool) -> str:
        """The socket of a running sidecar, or of one that is started. Raises ConnectorStartError."""
        path = self._socket(rank)
        if self._settings.sidecar != "auto":
            return str(path)
        _make_private(path.parent)
        command = _command(self._config, self._settings, rank)
        thread = SidecarThread(command, str(path)) if in_process else None
        self._own = thread or OwnSidecar(command, str(path), on_any_cpu=True)
        try:
            self._own.start()
        except SidecarStartError as error:
            raise ConnectorStartError(f"{error}; see kv_connector_extra_config.listen, transport, store") from error
        return str(path)

    def _layout(self, kv_caches: dict[str, KvTensors], planes: Any, num_blocks: int, rank: int) -> KvLayout:
        model, parallel = self._config.model_config, self._config.parallel_config
        num_kv_heads = model.get_num_kv_heads(parallel)
        axes = axes_of(kv_caches, num_blocks, self._block_size, num_kv_heads)
        _, first = tensors_of(kv_caches)[0]
        head_size = model.get_head_size()
        kernel = compat.kernel_order(self._config, model.dtype, head_size, self._block_size)
        return KvLayout(
            num_blocks=num_blocks,
            block_size=self._block_size,
            planes=planes,
            num_layers=len(kv_caches),
            num_kv_heads=num_kv_heads,
            head_dim=head_size,
            dtype=str(first.dtype).removeprefix("torch."),
            model=compat.model_name(self._config),
            order=f"{kernel},{order_of(kv_caches, num_blocks, axes)}",
            axes=axes,
            tp_rank=rank,
            tp_size=parallel.tensor_parallel_size,
            total_kv_heads=compat.total_kv_heads(model),
        )


def _command(vllm_config: Any, settings: ConnectorSettings, rank: int) -> SidecarCommand:
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    return SidecarCommand(
        engine_id=str(vllm_config.kv_transfer_config.engine_id),
        listen=listen_of(settings, rank),
        transport=settings.transport,
        metrics_port=settings.metrics_port + rank if settings.metrics_port else 0,
        rank=rank,
        log_level=settings.log_level,
        more=sidecar_flags(settings.store, num_ranks) if settings.store is not None else (),
    )


def _make_private(directory: Path) -> None:
    """A directory for sockets that nobody else can have prepared. Raises ConnectorStartError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ConnectorStartError(f"{directory} can be written by others; remove it, or set TMPDIR")


def _refuse_what_cannot_work(vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> None:
    parallel = vllm_config.parallel_config
    if settings.contract == "layerwise" and parallel.tensor_parallel_size > 1:
        raise ConnectorStartError(
            "kv_connector_extra_config.contract layerwise pushes from an engine of one rank to another, and "
            f"--tensor-parallel-size is {parallel.tensor_parallel_size}: use pull, or one rank"
        )
    if parallel.pipeline_parallel_size > 1:
        raise ConnectorStartError("BatonConnector knows no pipeline stages yet: use --tensor-parallel-size instead")
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or ()
    if len(groups) > 1:
        raise ConnectorStartError(
            f"this model has {len(groups)} KV cache groups, BatonConnector takes one: "
            "start vLLM with --disable-hybrid-kv-cache-manager"
        )
