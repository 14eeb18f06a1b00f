"""Host and port as one word."""

from __future__ import annotations


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def joined(host: str, port: int) -> str:
    return f"{bracketed(host)}:{port}"


def reachable(host: str, otherwise: str) -> str:
    """Where others reach a server that listens on `host`: on a wildcard, at `otherwise`."""
    return otherwise if host in ("0.0.0.0", "::") else host
