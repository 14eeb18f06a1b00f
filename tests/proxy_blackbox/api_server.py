"""What a Kubernetes API server is to a watcher of pods: lists in pages, watches from a version on, bookmarks, 410."""

from __future__ import annotations

import json
import ssl
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.proxy_blackbox.harness import HOST

ROLE, PORT = "pd-baton/role", "pd-baton/port"


class ApiServer:
    """`asked` has the path, query and Authorization of every call. Its pods all run on this host."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, dict[str, str], str]] = []
        self.token = ""
        """If set, who does not send it gets 401."""
        self.page_size = 1
        self.gone_as_event = True
        """Whether a version that is too old ends the watch by an ERROR event, or is refused by its status."""
        self._pods: dict[str, dict[str, Any]] = {}
        self._version = 100
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._oldest = 0
        self._cuts = 0
        self._changed = threading.Condition()
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer((HOST, 0), handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://{HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.cut()
        self._server.shutdown()
        self._server.server_close()

    # --- what a test does

    def put(self, name: str, role: str, port: int | str | None, *, ready: bool = True, **meta: Any) -> None:
        """Create or change a pod."""
        with self._changed:
            self._version += 1
            kind = "MODIFIED" if name in self._pods else "ADDED"
            pod = {
                "metadata": {
                    "name": name, "uid": f"uid-{name}", "resourceVersion": str(self._version),
                    "labels": {ROLE: role}, "annotations": {} if port is None else {PORT: str(port)}, **meta,
                },
                "status": {
                    "phase": "Running", "podIP": HOST,
                    "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
                },
            }  # fmt: skip
            self._pods[name] = pod
            self._happened({"type": kind, "object": pod})

    def delete(self, name: str, *, unseen: bool = False) -> None:
        """`unseen`: nobody is told, as if the watch had been down."""
        with self._changed:
            self._version += 1
            pod = self._pods.pop(name)
            if not unseen:
                pod["metadata"]["resourceVersion"] = str(self._version)
                self._happened({"type": "DELETED", "object": pod})

    def say(self, event: dict[str, Any]) -> None:
        """Anything, in a watch."""
        with self._changed:
            self._version += 1
            self._happened(event)

    def bookmark(self) -> None:
        """Moves the watchers on to a version of which they have seen nothing."""
        with self._changed:
            self._version += 50
            meta = {"resourceVersion": str(self._version), "creationTimestamp": None}
            self._happened({"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": meta}})

    def compact(self) -> None:
        """Forget history: who watches from before is told 410 Gone."""
        with self._changed:
            self._version += 1
            self._oldest = self._version

    def cut(self) -> None:
        """End every watch, in good order."""
        with self._changed:
            self._cuts += 1
            self._changed.notify_all()

    def _happened(self, event: dict[str, Any]) -> None:
        self._events.append((self._version, event))
        self._changed.notify_all()

    # --- what it answers

    def page(self, query: dict[str, str]) -> dict[str, Any]:
        with self._changed:
            names = sorted(self._pods)
            start = int(query.get("continue", 0))
            end = start + self.page_size
            more = str(end) if end < len(names) else ""
            meta = {"resourceVersion": str(self._version), **({"continue": more} if more else {})}
            return {"kind": "PodList", "metadata": meta, "items": [self._pods[one] for one in names[start:end]]}

    def is_gone(self, version: int) -> bool:
        return version < self._oldest

    def watch(self, version: int, send: Any) -> None:
        with self._changed:
            cuts = self._cuts
        while True:
            with self._changed:
                due = [(at, event) for at, event in self._events if at > version]
                if not due:
                    if self._cuts != cuts:
                        return
                    self._changed.wait(20)
                    continue
            for version, event in due:  # noqa: B007 - the next round goes on from the last one
                send(event)


class _Handler(BaseHTTPRequestHandler):
    api: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        given = self.headers.get("Authorization", "")
        self.api.asked.append((parts.path, query, given))
        if self.api.token and given != f"Bearer {self.api.token}":
            self._say(401, {"kind": "Status", "code": 401, "message": "Unauthorized"})
        elif "watch" not in query:
            self._say(200, self.api.page(query))
        elif self.api.is_gone(int(query["resourceVersion"])) and not self.api.gone_as_event:
            self._say(410, {"kind": "Status", "code": 410, "message": "too old resource version"})
        else:
            self._watch(int(query["resourceVersion"]))

    def _say(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _watch(self, version: int) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True

        def send(event: Any) -> None:
            """In two chunks, so that a line is split."""
            line = json.dumps(event).encode() + b"\n"
            for part in (line[:20], line[20:]):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                self.wfile.flush()

        with suppress(OSError):
            if self.api.is_gone(version):
                send({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
            else:
                self.api.watch(version, send)
            self.wfile.write(b"0\r\n\r\n")
