"""The proxy's configuration, declared once: the TOML file and the flags are both made from this class.

Names and defaults of the first group are those of the vllm-ascend example proxies (ascend-proxy.md 2.1).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxy.contracts import AUTO, CONTRACTS
from proxy.errors import ConfigError
from proxy.scheduling import POLICIES

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Bytes = Annotated[int, Field(ge=1)]
WILDCARDS = frozenset(("", "0.0.0.0", "::"))
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
AccessLogForm = Literal["text", "json", "off"]
ServerTiming = Literal["asked", "always", "off"]


_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ProxyConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    host: str = Field("localhost", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    prefiller_hosts: tuple[str, ...] = Field(("localhost",), description="hosts of the prefillers")
    prefiller_ports: tuple[Port, ...] = Field((8001,), description="their ports; one host may have several")
    prefiller_hosts_num: tuple[int, ...] = Field((), description="how often each prefiller host is repeated")
    prefiller_ports_inc: tuple[int, ...] = Field((), description="how many consecutive ports each prefiller port means")
    decoder_hosts: tuple[str, ...] = Field(("localhost",), description="hosts of the decoders")
    decoder_ports: tuple[Port, ...] = Field((8002,), description="their ports; one host may have several")
    decoder_hosts_num: tuple[int, ...] = Field((), description="how often each decoder host is repeated")
    decoder_ports_inc: tuple[int, ...] = Field((), description="how many consecutive ports each decoder port means")
    max_retries: int = Field(3, ge=0, le=100, description="attempts a leg of a request (at least one is made)")
    retry_delay: float = Field(0.001, ge=0, le=60, description="seconds before the first retry, doubled for each next")
    max_waiting_retries: int = Field(3, ge=1, description="probes before an added instance that is down is dropped")
    waiting_retry_interval: float = Field(10, gt=0, description="seconds between probes of an added instance")
    workers: int = Field(1, ge=1, le=64, description="processes that serve on one port; each takes up to one core")
    log_level: LogLevel = Field("INFO", description="DEBUG, INFO, WARNING, ERROR or CRITICAL")
    access_log: AccessLogForm = Field(
        "text", description="a line a request on stderr: text (key=value), json or off; by default off above INFO"
    )
    server_timing: ServerTiming = Field(
        "asked", description="Server-Timing on answers: asked (by the header X-Server-Timing: 1), always or off"
    )
    server_timing_instances: bool = Field(False, description="name the prefiller and the decoder in Server-Timing")

    contract: str = Field(
        AUTO, description="KV hand-off contract, auto asks the instances: " + ", ".join([AUTO, *CONTRACTS])
    )
    policy: str = Field("least_load", description="how an instance is chosen: " + ", ".join(POLICIES))
    prefill_policy: str = Field("", description="how a prefiller is chosen, where not by --policy")
    decode_policy: str = Field("", description="how a decoder is chosen, where not by --policy")
    max_children: int = Field(
        128,
        ge=1,
        le=10_000,
        description="prompts times choices up to which a request is divided into one request each; beyond it a decoder "
        "computes it alone",
    )
    allow_client_kv_transfer_params: bool = Field(
        False, description="let clients send kv_transfer_params of their own; such a request goes to a decoder as it is"
    )

    max_body_bytes: Bytes = Field(64 << 20, description="largest request body; beyond it 413")
    max_head_bytes: Bytes = Field(64 << 10, description="largest request head; beyond it 431")
    max_answer_bytes: Bytes = Field(256 << 20, description="largest answer that is held before it is passed on")
    max_first_event_bytes: Bytes = Field(4 << 20, description="largest first event of a stream that is waited for")
    relay_thread: Literal["auto", "off"] = Field(
        "auto", description="pass token events on in a thread without Python where it was built, or never"
    )
    listen_backlog: int = Field(4096, ge=1, le=65535, description="connections the kernel may queue")

    connect_timeout_s: Seconds = Field(5, description="to connect to an instance")
    prefill_timeout_s: Seconds = Field(600, description="from sending a prefill to its whole answer")
    first_token_timeout_s: Seconds = Field(
        600, description="from sending a decode, or the end of the prefill it waits for, to its first event"
    )
    between_tokens_timeout_s: Seconds = Field(300, description="silence in the middle of a stream")
    total_timeout_s: float = Field(
        0,
        ge=0,
        le=86400,
        description="for a whole request, from its arrival to the end of its stream; 0 is no limit",
    )
    request_read_timeout_s: Seconds = Field(60, description="for a client to send a whole request")
    client_keepalive_s: Seconds = Field(75, description="idle time of a client's connection")
    upstream_keepalive_s: Seconds = Field(
        4, description="idle time of a connection to an instance; less than the 5 s after which vLLM closes it"
    )
    min_remote_prefill_tokens: int = Field(
        0, ge=0, description="shorter prompts are prefilled by the decoder itself; 0 splits every request"
    )
    decoder_max_streams: int = Field(0, ge=0, description="requests a decoder takes at once; 0 is no limit")
    decoder_kv_tokens: int = Field(
        0, ge=0, description="tokens of KV a decoder holds; 0 takes what its /metrics say, and no limit if they don't"
    )
    decoder_kv_overcommit: float = Field(
        1.0, gt=0, le=100, description="part of the KV its /metrics say that is reserved; above 1 counts on early ends"
    )
    capacity_interval_s: Seconds = Field(
        10, description="between readings of instances' /metrics: KV capacity, own queue"
    )
    max_queued_requests: int = Field(1024, ge=0, description="requests that may wait for a decoder; beyond it 429")
    queue_timeout_s: Seconds = Field(60, description="how long a request may wait for a decoder; after it 503")
    keepalive_interval: float = Field(
        0,
        ge=0,
        le=3600,
        description="seconds between SSE comments to a client whose stream has not begun (queue, prefill); 0: none. "
        "The first one commits the 200: what fails after it is told by an error event in the stream, not by a status",
    )

    # answers that go on after a decoder is lost, or gave up the KV
    max_continuations: int = Field(
        8, ge=0, description="times an answer is continued on another decoder; 0 ends it with an error event"
    )
    max_continuation_bytes: int = Field(
        4 << 20, ge=0, description="of a stream kept in case its decoder is lost; a longer one is not continued"
    )

    discover: Literal["", "k8s"] = Field("", description="where instances are found besides those named: k8s, for pods")
    k8s_selector: str = Field("", description="label selector of the pods that are instances, such as app=vllm")
    k8s_namespace: str = Field("", description="their namespace (empty: that of the proxy's own pod)")
    k8s_role_label: str = Field("pd-baton/role", description="label that says prefill, decode or both")
    k8s_port_annotation: str = Field("pd-baton/port", description="annotation that says a pod's port")
    k8s_port: Port = Field(8000, description="port of pods without that annotation")
    k8s_api: str = Field("", description="URL of the API server (empty: that of the cluster the proxy runs in)")
    k8s_token_file: str = Field(_SERVICE_ACCOUNT + "/token", description="bearer token for it, read for every call")
    k8s_ca_file: str = Field(_SERVICE_ACCOUNT + "/ca.crt", description="certificate authority of it")
    dns_refresh_interval: float = Field(
        30, ge=0, le=86400, description="seconds between look-ups of instances' host names; 0 leaves it to each connect"
    )

    instance_drain_timeout_s: Seconds = Field(
        600, description="for what is open on an instance that was removed, and for the KV it handed out to be read"
    )
    # what a contract other than pull needs to know
    advertise_url: str = Field(
        "", description="where decoders reach this proxy, http://host:port; needed for layerwise on a wildcard --host"
    )
    metaserver_wait_s: Seconds = Field(
        1, description="how long a layerwise decoder's call waits for its prefill before it is answered ok"
    )
    prefiller_bootstrap_ports: tuple[Port, ...] = Field(
        (8998,), description="bootstrap ports of the prefillers (mooncake, sglang): one for all, or one for each"
    )
    prefiller_kv_ports: tuple[Port, ...] = Field(
        (14579,), description="KV ports of the prefillers (p2p-nccl): one for all, or one for each"
    )
    decoder_kv_ports: tuple[Port, ...] = Field(
        (14579,), description="KV ports of the decoders (p2p-nccl): one for all, or one for each"
    )

    drain_timeout_s: Seconds = Field(30, description="for requests in flight when told to stop")
    reclaim_timeout_s: Seconds = Field(5, description="for giving orphaned KV back")
    health_interval_s: Seconds = Field(2, description="between probes of an instance that is well")
    health_retry_interval_s: Seconds = Field(0.5, description="between probes of an instance that is out")
    health_timeout_s: Seconds = Field(3, description="for the answer to a probe")
    health_max_failures: int = Field(
        2, ge=1, description="consecutive failures to connect or of probes that take it out"
    )
    health_max_request_failures: int = Field(
        5, ge=1, description="consecutive requests that fail on an instance (5xx, reset, no answer) before it is out"
    )

    # what a hostile network may do (docs/security.md)
    max_header_fields: int = Field(100, ge=1, le=10_000, description="header fields of a request; beyond it 431")
    max_connections: int = Field(
        8192,
        ge=1,
        description="clients' connections open at once, of all workers; beyond it only /health and /metrics answer",
    )
    header_read_timeout_s: Seconds = Field(10, description="for a client to send a request's head, from its first byte")
    min_upload_bytes_per_s: int = Field(
        256, ge=0, description="a request's body that comes more slowly for 10 s is given up; 0 is no limit"
    )
    client_write_timeout_s: Seconds = Field(
        120, description="for a client that takes nothing of its answer, while some waits for it"
    )

    tls_cert: str = Field("", description="certificate chain (PEM) to serve HTTPS with; read again at SIGHUP")
    tls_key: str = Field("", description="its private key (PEM)")
    upstream_tls: bool = Field(False, description="speak HTTPS to the instances, as with hosts written https://HOST")
    upstream_ca: str = Field("", description="certificate authorities of the instances (PEM; default: the system's)")
    upstream_server_name: str = Field(
        "", description="name that the instances' certificates are checked for (default: each one's own host)"
    )
    upstream_tls_insecure: bool = Field(False, description="do not check the instances' certificates")

    api_key: tuple[str, ...] = Field((), description="keys that clients may use; none asks for none")
    api_key_file: str = Field("", description="more of them, one a line, # begins a comment; followed as it changes")
    admin_api_key: tuple[str, ...] = Field(
        (), description="keys for /instances, /reset_prefix_cache, profiles and the engines' own admin routes"
    )
    admin_api_key_file: str = Field("", description="more of them, as in --api-key-file")
    metrics_auth: Literal["open", "client", "admin"] = Field("open", description="whose key /metrics asks for")
    upstream_api_key: str = Field("", description="key the instances are called with (default: OPENAI_API_KEY)")
    upstream_api_key_file: str = Field("", description="file with that key")
    metaserver_allow: tuple[str, ...] = Field(
        (), description="addresses or networks, besides the decoders' own, that may call /v1/metaserver; any for all"
    )
    allow_engine_admin_routes: bool = Field(
        False, description="pass /sleep, /pause, /load_lora_adapter and the like on without an admin key"
    )

    @property
    def speaks_tls_upstream(self) -> bool:
        return self.upstream_tls or any(_is_https(host) for host in (*self.prefiller_hosts, *self.decoder_hosts))

    @property
    def max_connections_each(self) -> int:
        """A worker's share."""
        return -(-self.max_connections // self.workers)

    def policy_of(self, role: str) -> str:
        """The name of the policy for `role`, "prefill" or "decode"."""
        return (self.decode_policy if role == "decode" else self.prefill_policy) or self.policy

    @property
    def prefillers(self) -> tuple[Address, ...]:
        if self._has_none("prefiller"):
            return ()
        return expand(
            "prefiller", self.prefiller_hosts, self.prefiller_ports, self.prefiller_hosts_num, self.prefiller_ports_inc
        )

    @property
    def decoders(self) -> tuple[Address, ...]:
        if self._has_none("decoder"):
            return ()
        return expand("decoder", self.decoder_hosts, self.decoder_ports, self.decoder_hosts_num, self.decoder_ports_inc)

    def _has_none(self, role: str) -> bool:
        """Named empty, or left to discovery: instances will come by themselves."""
        hosts, ports = f"{role}_hosts", f"{role}_ports"
        if self.discover and not {hosts, ports} & self.model_fields_set:
            return True
        return not getattr(self, hosts) and ports not in self.model_fields_set


def expand(
    role: str, hosts: Sequence[str], ports: Sequence[int], hosts_num: Sequence[int], ports_inc: Sequence[int]
) -> tuple[Address, ...]:
    """Hosts and ports, repeated and incremented as the seeds' flags have it, paired up. Raises ConfigError.

    `hosts A B`, `hosts_num 2 1` means A A B; `ports 9000 9100`, `ports_inc 2 1` means 9000 9001 9100.
    """
    for flag, values, counts in (("hosts", hosts, hosts_num), ("ports", ports, ports_inc)):
        suffix = "num" if flag == "hosts" else "inc"
        if counts and (len(counts) != len(values) or min(counts) < 1):
            raise ConfigError(
                f"--{role}-{flag}-{suffix} needs one number of at least 1 for each of the {len(values)} --{role}-{flag}"
            )
    all_hosts = [host for host, num in zip(hosts, hosts_num or (1,) * len(hosts), strict=True) for _ in range(num)]
    all_ports = [port + i for port, inc in zip(ports, ports_inc or (1,) * len(ports), strict=True) for i in range(inc)]
    if len(all_hosts) == 1:
        all_hosts *= len(all_ports)
    if len(all_hosts) != len(all_ports):
        raise ConfigError(
            f"{len(all_hosts)} --{role}-hosts but {len(all_ports)} --{role}-ports: give one port for each host, "
            "or one host with several ports"
        )
    if all_ports and max(all_ports) > 65535:
        raise ConfigError(f"--{role}-ports-inc goes beyond port 65535")
    found = tuple(Address(_bare(host), port) for host, port in zip(all_hosts, all_ports, strict=True))
    twice = next((address for i, address in enumerate(found) if address in found[:i]), None)
    if twice:
        raise ConfigError(f"--{role}-hosts and --{role}-ports name {twice} twice")
    return found


def _is_https(host: str) -> bool:
    return host.lower().startswith("https://")


def _bare(host: str) -> str:
    return (host[len("https://") :].rstrip("/") if _is_https(host) else host).strip("[]")


# What a reload may change: who the instances are.
INSTANCE_KEYS = tuple(
    f"{role}_{rest}" for role in ("prefiller", "decoder") for rest in ("hosts", "ports", "hosts_num", "ports_inc")
)


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def load_config(path: Path | None, flags: Mapping[str, Any]) -> ProxyConfig:
    """The file's values with the flags' on top. Raises ConfigError, one line."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}") from None
    known = list(ProxyConfig.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}'{nearest(key, known)}")
    try:
        config = ProxyConfig(**{**values, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        name = "--" + key.replace("_", "-") if key in flags else f"{path}: '{key}'"
        got = "" if "api_key" in key else f", got {first['input']!r}"  # a secret is not for a terminal, or a log
        raise ConfigError(f"{name}: {first['msg']}{got}") from None
    _check(config)
    return config


def _check(config: ProxyConfig) -> None:
    choices: tuple[tuple[str, str, Collection[str]], ...] = (
        ("contract", config.contract, (AUTO, *CONTRACTS)),
        ("policy", config.policy, POLICIES),
        ("prefill-policy", config.policy_of("prefill"), POLICIES),
        ("decode-policy", config.policy_of("decode"), POLICIES),
    )
    for name, value, known in choices:
        if value not in known:
            raise ConfigError(f"--{name} {value}: not one of {', '.join(known)}{nearest(value, list(known))}")
    _ = config.prefillers, config.decoders  # raise where hosts and ports do not fit together
    _check_tls(config)
    check_contract(config)


def _check_tls(config: ProxyConfig) -> None:
    hosts = (*config.prefiller_hosts, *config.decoder_hosts)
    clear = next((host for host in hosts if not _is_https(host)), None)
    if config.speaks_tls_upstream and not config.upstream_tls and clear is not None:
        raise ConfigError(f"host {clear}: write https:// before all hosts, or before none, or use --upstream-tls")
    odd = next((host for host in hosts if "://" in host and not _is_https(host)), None)
    if odd is not None:
        raise ConfigError(f"host {odd}: write the host alone, or https://HOST")
    for key in ("upstream_ca", "upstream_server_name", "upstream_tls_insecure"):
        if getattr(config, key) and not config.speaks_tls_upstream:
            raise ConfigError(f"--{key.replace('_', '-')} needs --upstream-tls, or hosts written https://HOST")


def check_contract(config: ProxyConfig) -> None:
    """Whether the configuration has what its contract needs. Raises ConfigError."""
    per_instance = (
        ("prefiller_bootstrap_ports", config.prefillers),
        ("prefiller_kv_ports", config.prefillers),
        ("decoder_kv_ports", config.decoders),
    )
    for key, instances in per_instance:
        ports = getattr(config, key)
        if len(ports) not in (1, len(instances)):
            flag = "--" + key.replace("_", "-")
            raise ConfigError(f"{flag} has {len(ports)} ports for {len(instances)} instances: give one for all or each")
    url = urlsplit(config.advertise_url)
    if config.advertise_url and (url.scheme not in ("http", "https") or not url.netloc):
        raise ConfigError(f"--advertise-url {config.advertise_url}: not a URL such as http://10.0.0.1:8000")
    if config.contract == "layerwise" and not config.advertise_url and config.host.strip("[]") in WILDCARDS:
        raise ConfigError(
            f"--contract layerwise with --host {config.host or repr('')}: decoders need an address to call back; "
            f"add --advertise-url http://ADDRESS:{config.port}"
        )
    contract = CONTRACTS.get(config.contract)
    if contract is not None and not contract.decodes_alone and config.min_remote_prefill_tokens:
        raise ConfigError(
            f"--min-remote-prefill-tokens: decoders of --contract {config.contract} cannot prefill by themselves"
        )
