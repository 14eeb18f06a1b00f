"""Run in a network of its own, where any address can be loopback's: one command of a seed with the script's name
replaced, mock engines at the addresses that it names, and requests to the proxy where it listens."""

from __future__ import annotations

import http.client
import json
import shlex
import subprocess
import sys
from typing import Any

from tests.proxy_blackbox.harness import CHAT, COMPLETIONS, PROXY, Answer, Engines, Process, eventually, text_for

NUM_REQUESTS = 12
LISTENING = r"ready listen=(\S+):(\d+)"
# Those that the seeds verify their deployments with, and what theirs is streamed.
ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    (COMPLETIONS, {"model": "mock", "prompt": "Who are you?", "max_tokens": 100, "temperature": 0}),
    (
        CHAT,
        {
            "model": "mock", "max_completion_tokens": 100, "temperature": 0,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": [
                    {"type": "image_url", "image_url": {"url": "https://example.org/qwen.png"}},
                    {"type": "text", "text": "What is the text in the illustration?"},
                ]},
            ],
        },
    ),
)  # fmt: skip


def asked(host: str, port: int, method: str, path: str, fields: dict[str, Any] | None = None) -> Answer:
    connection = http.client.HTTPConnection(host, port, timeout=15)
    try:
        connection.request(method, path, fields and json.dumps(fields), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def main(command: str, contract: str) -> None:
    words = shlex.split(command.replace("\\\n", ""))
    hosts = sorted({word for word in words if word.count(".") == 3 and word != "0.0.0.0"})
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for host in hosts:
        subprocess.run(["ip", "address", "add", f"{host}/32", "dev", "lo"], check=True)
    proxy = Process([PROXY, *words[2:]])
    found = proxy.wait_for(LISTENING)
    host, port = (hosts[0] if found[1] == "0.0.0.0" else found[1]), int(found[2])
    members = asked(host, port, "GET", "/instances").json["instances"]
    at = {role: [one["address"] for one in members if one["role"] == role] for role in ("prefill", "decode")}
    engines = Engines(0, 0, "--contract", contract, "--prefill-at", *at["prefill"], "--decode-at", *at["decode"])
    try:

        def wrong() -> object:
            state = asked(host, port, "GET", "/instances").json
            return [one for one in state["instances"] if not one["healthy"]] or state["contract"]["name"] != contract

        eventually(wrong, "not all instances are well, or the contract was not found", 30)
        for number in range(NUM_REQUESTS):
            path, fields = ASKED[number % len(ASKED)]
            fields = {**fields, "stream": number % 3 == 0, "user": str(number)}
            answer = asked(host, port, "POST", path, fields)
            assert (answer.status, answer.text) == (200, text_for(fields)), answer.body[:500]
        assert engines.count("prefill", "prefills") == engines.count("decode", "decodes") == NUM_REQUESTS
        eventually(engines.wrong, "the engines were wronged")
    finally:
        engines.process.stop()
        status = proxy.stop()
    assert status == 0, proxy.output


if __name__ == "__main__":
    main(*sys.argv[1:])
