"""`GET /` and `GET /status`: what `GET /instances` says, for eyes. One page of our own, which loads nothing from
elsewhere, holds no data itself, and writes every value as text."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from aiohttp import web

_PAGE = resources.files("proxy").joinpath("status.html").read_bytes()


def _hash(tag: bytes) -> str:
    """Of the one script or style, as the policy below has it: nothing else may run, whatever a value holds."""
    content = _PAGE.partition(b"<" + tag + b">")[2].partition(b"</" + tag + b">")[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode() + "'"


_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hash(b'script')}; style-src {_hash(b'style')}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def status_page(_: web.Request) -> web.Response:
    return web.Response(body=_PAGE, content_type="text/html", charset="utf-8", headers=_HEADERS)
