"""Who may ask for what: the routes, whose keys they need, and what becomes of a key.

| routes | key |
|---|---|
| `/health`, `/ping`, `/healthcheck`; `/` and `/status`, a page without data | none |
| `/metrics` | by `--metrics-auth` |
| `/v1/metaserver` | none: ids and addresses are checked there (`metaserver.py`) |
| `/instances` and below, `/reset_prefix_cache`, profiles | an admin key; without any configured, a client key |
| what changes or discloses an engine (`ENGINE_ADMIN`) | an admin key; without any configured, refused |
| all others | a client key, where there are any; an admin key will do |

A key that is one of ours is never passed on. Where no client keys are configured, other credentials are the
instances' to judge, and pass.
"""

from __future__ import annotations

import posixpath
from urllib.parse import unquote_to_bytes

from proxy.config import ProxyConfig
from proxy.errors import ProxyError
from proxy.http1 import RequestHead
from proxy.keys import Keys, digest_of
from proxy.openai_api import ROUTES

OPEN = frozenset((b"/health", b"/ping", b"/healthcheck", b"/v1/metaserver", b"/", b"/status"))
METRICS = b"/metrics"
ADMIN = frozenset((b"/instances", b"/reset_prefix_cache", b"/start_profile", b"/stop_profile"))
# Of vLLM, vllm-ascend and SGLang: they stop, change, or disclose an engine, or run what they are given.
ENGINE_ADMIN = frozenset(
    b"/sleep /wake_up /is_sleeping /collective_rpc /pause /resume /is_paused /scale_elastic_ep /is_scaling_elastic_ep "
    b"/load_lora_adapter /unload_lora_adapter /v1/load_lora_adapter /v1/unload_lora_adapter /server_info "
    b"/get_server_info /get_internal_state /set_internal_state /update_weights /init_weight_transfer_engine "
    b"/init_weights_update_group /destroy_weights_update_group /update_weights_from_disk /update_weight_version "
    b"/update_weights_from_distributed /update_weights_from_tensor /update_weights_from_ipc /get_weights_by_name "
    b"/get_world_size /release_memory_occupation /resume_memory_occupation /pause_generation /continue_generation "
    b"/flush_cache /clear_hicache_storage_backend /attach_hicache_storage_backend /detach_hicache_storage_backend "
    b"/slow_down /abort_request /abort_requests /configure_logging /freeze_gc /dumper /reset_mm_cache "
    b"/reset_encoder_cache /start_expert_distribution_record /stop_expert_distribution_record "
    b"/dump_expert_distribution_record /open_session /close_session /set_trace_level /exit /shutdown /kill "
    b"/invocations /query /register_dp_rank".split()
)
_MAX_DECODINGS = 4


def plain_path(path: bytes) -> bytes:
    """The path as the most helpful server might read it: escapes, doubled slashes, dots and letter case undone."""
    for _ in range(_MAX_DECODINGS):
        decoded = unquote_to_bytes(path)
        if decoded == path:
            break
        path = decoded
    return b"/" + posixpath.normpath(path.replace(b"\\", b"/")).strip(b"/").partition(b";")[0].lower()


class Access:
    def __init__(self, config: ProxyConfig) -> None:
        """Raises ConfigError."""
        self._metrics_auth = config.metrics_auth
        self._allow_engine_admin = config.allow_engine_admin_routes
        self._client = Keys(config.api_key, config.api_key_file, "--api-key")
        self._admin = Keys(config.admin_api_key, config.admin_api_key_file, "--admin-api-key")
        self._has_keys = self._client.are_asked_for or self._admin.are_asked_for

    def reload(self, config: ProxyConfig) -> None:
        """Raises ConfigError, and changes nothing then."""
        read = Access(config)
        self._client, self._admin, self._has_keys = read._client, read._admin, read._has_keys

    def follow(self) -> None:
        """Called now and then: key files may have changed."""
        self._client.follow()
        self._admin.follow()

    @property
    def admin_is_open(self) -> bool:
        return not self._has_keys

    def judge(self, head: RequestHead) -> None:
        """Raises ProxyError: 401, or 403 where no key would help. A key of ours is taken out of `head`."""
        if not self._has_keys and head.path in ROUTES:
            return
        is_client, is_admin = self._whose(head) if self._has_keys else (False, False)
        if head.path in ROUTES:
            self._need(is_client or is_admin or not self._client.are_asked_for)
            return
        if head.path in OPEN:  # as it is written: other spellings may be another server's route
            return
        path = plain_path(head.path)
        if path == METRICS:
            self._judge_metrics(is_client, is_admin)
            if head.path == METRICS:
                return
        elif path in ADMIN or path.startswith(b"/instances/"):
            enough = is_admin if self._admin.are_asked_for else is_client or not self._client.are_asked_for
            self._need(enough, admin=self._admin.are_asked_for)
            return
        elif path in ENGINE_ADMIN and not is_admin and not self._allow_engine_admin:
            self._refuse_engine_admin()
        self._need(is_client or is_admin or not self._client.are_asked_for)

    def _judge_metrics(self, is_client: bool, is_admin: bool) -> None:
        if self._metrics_auth == "admin":
            self._need(is_admin, admin=True)
        elif self._metrics_auth == "client":
            self._need(is_client or is_admin)

    def _refuse_engine_admin(self) -> None:
        if self._admin.are_asked_for:
            self._need(False, admin=True)
        raise ProxyError(
            403, "This route of the engines is not passed on (--admin-api-key, --allow-engine-admin-routes).",
            error_type="PermissionDeniedError",
        )  # fmt: skip

    def _whose(self, head: RequestHead) -> tuple[bool, bool]:
        """Whether the request has a client's and whether it has an admin's key."""
        is_client = is_admin = False
        for key in (bearer_of(head.authorization), head.api_key):
            if key:
                digest = digest_of(key)
                knows_client, knows_admin = self._client.know(digest), self._admin.know(digest)
                if knows_client or knows_admin:
                    head.identity = digest
                is_client, is_admin = is_client or knows_client, is_admin or knows_admin
        if is_client or is_admin or self._client.are_asked_for:
            head.authorization = head.api_key = None
        return is_client, is_admin

    @staticmethod
    def _need(fulfilled: bool, admin: bool = False) -> None:
        if not fulfilled:
            kind = "an admin key" if admin else "an API key"
            raise ProxyError(
                401, f"This needs {kind}: Authorization: Bearer KEY, or x-api-key.", error_type="AuthenticationError"
            )


def bearer_of(authorization: bytes | None) -> bytes | None:
    """The key in an Authorization header, if it has one."""
    if authorization is None or authorization[:7].lower() != b"bearer ":
        return None
    return authorization[7:].strip(b" \t")
