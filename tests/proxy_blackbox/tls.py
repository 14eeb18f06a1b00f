"""Certificates made on the spot, and instances behind TLS: a relay that ends it before the mock engines."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.proxy_blackbox.harness import HOST, Process

HAS_OPENSSL = shutil.which("openssl") is not None


class Authority:
    """A certificate authority in a directory: `ca` is its certificate, `issue` gives a certificate and its key."""

    def __init__(self, where: Path) -> None:
        self._where = where
        where.mkdir(exist_ok=True)
        self.ca = where / "ca.pem"
        self._key = where / "ca.key"
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=test authority", "-keyout", self._key, "-out", self.ca,
        )  # fmt: skip

    def issue(self, name: str, names: str, days: int = 2) -> tuple[Path, Path]:
        """`names` as OpenSSL has them: `IP:127.0.0.1,DNS:localhost`."""
        certificate, key, request = (self._where / f"{name}.{end}" for end in ("pem", "key", "csr"))
        extensions = self._where / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
        _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
                 "-keyout", key, "-out", request)  # fmt: skip
        _openssl("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial", "-days",
                 str(days), "-extfile", extensions, "-out", certificate)  # fmt: skip
        return certificate, key


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@contextmanager
def behind_tls(ports: Sequence[int], certificate: Path, key: Path) -> Iterator[tuple[int, ...]]:
    """Ports on which the same instances speak TLS."""
    process = Process([sys.executable, "-m", "tests.proxy_blackbox.tls", str(certificate), str(key), *map(str, ports)])
    try:
        yield tuple(map(int, process.wait_for(r"ready ([\d,]+)\n")[1].split(",")))
    finally:
        process.stop()


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def start(port: int, context: ssl.SSLContext) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(HOST, port)
        await asyncio.gather(relay(reader, back), relay(there, writer))

    return await asyncio.start_server(serve, HOST, 0, ssl=context)


async def main(certificate: str, key: str, *ports: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    servers = [await start(int(port), context) for port in ports]
    print("ready", ",".join(str(one.sockets[0].getsockname()[1]) for one in servers), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
