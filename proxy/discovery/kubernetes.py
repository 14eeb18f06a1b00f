"""`--discover k8s`: the pods that a label selector names are the instances, by the API server's HTTP interface.

List, then watch from the list's resourceVersion (Kubernetes documentation, "API concepts": efficient detection of
changes); bookmarks move it on, and 410 Gone means list again. A pod is an instance while it is ready and not being
deleted; its role is a label, its port an annotation or `--k8s-port`. While the API server can't be reached the last
answer holds. The service account's token is read again for every call: the kubelet replaces it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import orjson
from yarl import URL

from proxy.config import Address, ProxyConfig
from proxy.errors import ProxyError, StartError
from proxy.instance import Role, Source
from proxy.membership import Membership

log = logging.getLogger(__name__)

LIST_LIMIT = 500  # pods a page
WATCH_S = 240  # after it the API server ends a watch, and another begins where it ended
SILENCE_S = WATCH_S + 30.0
CALL_TIMEOUT_S = 30.0
FIRST_BACK_OFF_S = 1.0
MAX_BACK_OFF_S = 30.0
MAX_EVENT_BYTES = 8 << 20  # etcd keeps no object beyond 1.5 MiB
NONSENSE = (ValueError, LookupError, TypeError, AttributeError)  # what reading an answer of another shape raises
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
ROLES = {
    "prefill": (Role.PREFILL,),
    "prefiller": (Role.PREFILL,),
    "decode": (Role.DECODE,),
    "decoder": (Role.DECODE,),
    "both": (Role.PREFILL, Role.DECODE),
}

Place = tuple[Role, Address]
NOWHERE: frozenset[Place] = frozenset()


class Gone(Exception):
    """The resourceVersion is too old to go on from: list again."""


class ApiTrouble(Exception):
    """The API server said no, or nothing that makes sense."""


class PodWatcher:
    def __init__(self, config: ProxyConfig, membership: Membership, loop: asyncio.AbstractEventLoop) -> None:
        self._config = config
        self._membership = membership
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None
        self._pods: dict[str, frozenset[Place]] = {}
        """By uid: where each pod serves; nowhere while it isn't ready."""
        self._seen: dict[str, frozenset[Place]] = {}
        """By uid: where each pod has ever served."""
        self._version = ""
        self._base = URL(api_url(config))
        self._query = {"labelSelector": config.k8s_selector} if config.k8s_selector else {}
        self._path = f"/api/v1/namespaces/{namespace_of(config)}/pods"
        self._ssl = ssl_context(config, self._base)

    def start(self) -> None:
        self._task = self._loop.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        back_off_s = FIRST_BACK_OFF_S
        connector = aiohttp.TCPConnector(ssl=self._ssl)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as self._session:
            while True:
                began = self._loop.time()
                trouble = ""
                try:
                    if not self._version:
                        await self._list()
                    async for event in self._watch():
                        self._apply(event)
                except Gone:
                    self._version, trouble = "", "410 Gone: listing again"
                except (aiohttp.ClientError, OSError, ApiTrouble) as error:
                    trouble = f"{type(error).__name__}: {error}"
                except NONSENSE as error:
                    self._version, trouble = "", f"not understood: {type(error).__name__}: {error}"
                if self._loop.time() - began > MAX_BACK_OFF_S:
                    back_off_s = FIRST_BACK_OFF_S
                if trouble:
                    log.warning("event=k8s_trouble retry_s=%g reason=%r", back_off_s, trouble)
                    await asyncio.sleep(back_off_s)
                    back_off_s = min(back_off_s * 2, MAX_BACK_OFF_S)
                else:  # the watch ended in its time, or too soon
                    await asyncio.sleep(max(0.0, FIRST_BACK_OFF_S - (self._loop.time() - began)))

    def _headers(self) -> dict[str, str]:
        try:
            token = Path(self._config.k8s_token_file).read_text().strip()
        except OSError:
            return {}
        return {"Authorization": f"Bearer {token}"}

    async def _get(self, query: dict[str, str], silence_s: float) -> aiohttp.ClientResponse:
        assert self._session is not None
        url = self._base.join(URL(f"{self._path}?{urlencode({**self._query, **query})}", encoded=True))
        answer = await self._session.get(
            url, headers=self._headers(), timeout=aiohttp.ClientTimeout(total=None, connect=10, sock_read=silence_s)
        )
        if answer.status == 410:
            answer.close()
            raise Gone
        if answer.status != 200:
            said = (await answer.content.read(300)).decode(errors="replace")
            answer.close()
            raise ApiTrouble(f"the API server answered {answer.status}: {said}")
        return answer

    async def _list(self) -> None:
        pods: dict[str, frozenset[Place]] = {}
        query = {"limit": str(LIST_LIMIT)}
        while True:
            async with await self._get(query, CALL_TIMEOUT_S) as answer:
                page = orjson.loads(await answer.read())
            for pod in page.get("items") or ():
                pods[pod["metadata"]["uid"]] = self._places(pod)
            more = page["metadata"].get("continue")
            if not more:
                break
            query = {"limit": str(LIST_LIMIT), "continue": more}
        for uid in self._seen.keys() - pods.keys():
            self._delete(uid)
        for uid, places in pods.items():
            self._become(uid, places)
        self._version = page["metadata"]["resourceVersion"]
        log.info("event=k8s_listed pods=%d", len(pods))

    async def _watch(self) -> AsyncIterator[dict[str, Any]]:
        query = {
            "watch": "1", "allowWatchBookmarks": "true",
            "resourceVersion": self._version, "timeoutSeconds": str(WATCH_S),
        }  # fmt: skip
        async with await self._get(query, SILENCE_S) as answer:
            held = bytearray()
            async for data in answer.content.iter_any():
                held += data
                while (end := held.find(b"\n")) >= 0:
                    line = bytes(held[:end])
                    del held[: end + 1]
                    if line.strip():
                        yield orjson.loads(line)
                if len(held) > MAX_EVENT_BYTES:
                    raise ApiTrouble(f"an event of more than {MAX_EVENT_BYTES} bytes")

    def _apply(self, event: dict[str, Any]) -> None:
        kind, thing = event.get("type"), event.get("object") or {}
        if kind == "ERROR":
            if thing.get("code") == 410:
                raise Gone
            self._version = ""
            raise ApiTrouble(f"the watch ended: {thing.get('message')}")
        meta = thing.get("metadata") or {}
        if kind in ("ADDED", "MODIFIED"):
            self._become(meta["uid"], self._places(thing))
        elif kind == "DELETED":
            self._delete(meta["uid"])
        self._version = meta.get("resourceVersion") or self._version

    def _become(self, uid: str, places: frozenset[Place]) -> None:
        """The pod serves at `places` from now on. An address may already be another pod's: it stays then."""
        before = self._pods.get(uid, NOWHERE)
        self._pods[uid] = places
        self._seen[uid] = self._seen.get(uid, NOWHERE) | places
        others = NOWHERE.union(*(one for name, one in self._pods.items() if name != uid))
        for role, address in before - places - others:
            self._membership.remove(role, address, Source.KUBERNETES)
        for role, address in places - before:
            try:
                self._membership.add(role, address, Source.KUBERNETES)
            except ProxyError as error:  # too many instances
                log.warning("event=k8s_ignored instance=%s reason=%r", address, error.message)

    def _delete(self, uid: str) -> None:
        self._become(uid, NOWHERE)
        del self._pods[uid]
        for role, address in self._seen.pop(uid):
            self._membership.forget(role, address)

    def _places(self, pod: dict[str, Any]) -> frozenset[Place]:
        """Where and as what this pod serves now. Raises one of NONSENSE."""
        meta, status = pod["metadata"], pod.get("status") or {}
        host = status.get("podIP")
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or ())
        if not host or not ready or meta.get("deletionTimestamp") or status.get("phase") != "Running":
            return NOWHERE
        config = self._config
        said = (meta.get("labels") or {}).get(config.k8s_role_label, "")
        roles = ROLES.get(said.lower(), ())
        if not roles:
            log.warning("event=k8s_ignored pod=%s reason='label %s=%s'", meta.get("name"), config.k8s_role_label, said)
        text = (meta.get("annotations") or {}).get(config.k8s_port_annotation) or str(config.k8s_port)
        if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
            log.warning("event=k8s_ignored pod=%s reason='port %s'", meta.get("name"), text[:20])
            return NOWHERE
        return frozenset((role, Address(host, int(text))) for role in roles)


def api_url(config: ProxyConfig) -> str:
    """Raises StartError outside a cluster, where nobody said which API server."""
    if config.k8s_api:
        return config.k8s_api
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise StartError("--discover k8s: this is not a pod; name the API server by --k8s-api https://HOST:PORT")
    return f"https://{Address(host, int(port))}"


def namespace_of(config: ProxyConfig) -> str:
    if config.k8s_namespace:
        return config.k8s_namespace
    try:
        return NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


def ssl_context(config: ProxyConfig, base: URL) -> ssl.SSLContext | bool:
    """Raises StartError if the CA file is named and can't be used."""
    if base.scheme != "https":
        return True
    path = Path(config.k8s_ca_file)
    try:
        return ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"--k8s-ca-file {path}: {error}") from None
