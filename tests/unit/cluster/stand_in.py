"""A stand-in for any of the commands: writes down that it began and ended, and serves what the supervisor asks for.

python stand_in.py JOURNAL KIND [the command's own flags]; behaves worse where the environment says so:
STAND_IN_DIE_AT_ONCE=NAME (status 3 after a word), STAND_IN_DEAF=NAME (ignores SIGTERM), STAND_IN_SICK=NAME (health
503), STAND_IN_CHILD=NAME (starts a child of its own, which ignores SIGTERM).
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

JOURNAL, KIND, FLAGS = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]


def flag(name: str, default: str = "") -> str:
    return FLAGS[FLAGS.index(name) + 1] if name in FLAGS else default


def name() -> str:
    if KIND == "proxy":
        return "proxy"
    own = "-".join(flag("--engine-id").split("-")[-2:])
    return own if KIND == "engine" else f"{own}.sidecar"


def note(event: str) -> None:
    with JOURNAL.open("a") as journal:
        journal.write(f"{event} {name()} {os.getpid()}\n")


def afflicted(how: str) -> bool:
    return os.environ.get(f"STAND_IN_{how}") == name()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = {"sidecar": "/healthz"}.get(KIND, "/health")
        self.answer(503 if afflicted("SICK") else 200 if self.path in (path, "/metrics") else 404)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        note("prompt")
        self.answer(200)

    def answer(self, status: int) -> None:
        body = json.dumps({"status": status}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True


def stop(*_: object) -> None:
    if not afflicted("DEAF"):
        note("end")
        os._exit(0)


def main() -> None:
    if FLAGS[:1] == ["make-model"]:
        Path(FLAGS[1]).mkdir()
        (Path(FLAGS[1]) / "config.json").write_text("{}")
        return
    signal.signal(signal.SIGTERM, stop)
    note("begin")
    if afflicted("DIE_AT_ONCE"):
        print("one\ntwo\nthe reason")
        sys.exit(int(os.environ.get("STAND_IN_STATUS", "3")))
    if afflicted("CHILD"):
        ignore = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", ignore])
        with JOURNAL.open("a") as journal:
            journal.write(f"child {name()} {child.pid}\n")
    port = flag("--metrics-port") if KIND == "sidecar" else flag("--port")
    if KIND == "sidecar":
        Path(flag("--socket")).touch()
    print(f"ready {name()}", flush=True)
    Server(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
