"""A stand-in for `vllm` and `mooncake_master` on PATH: writes down its argv and environment, and really serves.

python node_stand_in.py COMMAND [its flags]. STAND_IN_JOURNAL: one JSON line an event. A file SICK-PORT, DEAF-PORT or
DIE-PORT beside the journal makes that one answer 503, ignore SIGTERM, or end at once with status 3.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socketserver
import sys
from pathlib import Path
from typing import Any

JOURNAL, COMMAND, FLAGS = Path(os.environ["STAND_IN_JOURNAL"]), sys.argv[1], sys.argv[2:]


def flag(name: str, default: str = "") -> str:
    return FLAGS[FLAGS.index(name) + 1] if name in FLAGS else default


PORT = flag("--port")


def note(event: str, **more: object) -> None:
    said = {"event": event, "argv": [COMMAND, *FLAGS], "pid": os.getpid(), **more}
    with JOURNAL.open("ab", buffering=0) as journal:  # one write: readers see whole lines
        journal.write(json.dumps(said).encode() + b"\n")


def afflicted(how: str) -> bool:
    return JOURNAL.with_name(f"{how}-{PORT}").exists()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = {"/v1/models": {"object": "list", "data": [{"id": flag("--served-model-name"), "object": "model"}]}}
        self.answer(503 if afflicted("SICK") else 200, known.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        params = body.get("kv_transfer_params") or {}
        note("prompt", params=params, prompt=body.get("prompt"))
        choice = {"index": 0, "text": f" from {PORT}", "finish_reason": "length", "logprobs": None}
        said: dict[str, Any] = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
        said["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        if params.get("do_remote_decode"):
            said["kv_transfer_params"] = {"do_remote_prefill": True, "remote_port": PORT}
        self.answer(200, said)

    def answer(self, status: int, said: object) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True


class Accepting(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def stop(*_: object) -> None:
    if not afflicted("DEAF"):
        note("end")
        os._exit(0)


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    seen = {"cwd": os.getcwd(), "files": sorted(path.name for path in Path().iterdir())}
    note("begin", env=dict(os.environ), **seen)
    if afflicted("DIE"):
        print("the reason", flush=True)
        sys.exit(3)
    if COMMAND == "mooncake_master":
        Accepting(("0.0.0.0", int(PORT)), socketserver.BaseRequestHandler).serve_forever()
    elif "--headless" in FLAGS:
        signal.pause()
    else:
        Server((flag("--host"), int(PORT)), Handler).serve_forever()


if __name__ == "__main__":
    main()
