"""TLS on both sides: contexts for clients' connections and for the instances', made once and from nothing but files."""

from __future__ import annotations

import functools
import logging
import ssl

from proxy.config import ProxyConfig
from proxy.errors import ConfigError

log = logging.getLogger(__name__)


def server_context(config: ProxyConfig) -> ssl.SSLContext | None:
    """For clients; None where there is no certificate. Raises ConfigError."""
    if not config.tls_cert and not config.tls_key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, config)
    return context


def load_certificate(context: ssl.SSLContext, config: ProxyConfig) -> None:
    """Handshakes from now on are with this certificate. Raises ConfigError, and changes nothing then."""
    if not config.tls_cert or not config.tls_key:
        raise ConfigError("--tls-cert and --tls-key: both are needed")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, _no_password)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"--tls-cert {config.tls_cert} and --tls-key {config.tls_key}: {reason}") from None
    context.load_cert_chain(config.tls_cert, config.tls_key)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not")


def upstream_context(config: ProxyConfig) -> ssl.SSLContext | None:
    """For instances; None where they are spoken to in clear. Raises ConfigError."""
    if not config.speaks_tls_upstream:
        return None
    return _upstream_context(config.upstream_ca, config.upstream_tls_insecure)


@functools.cache
def _upstream_context(ca: str, insecure: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except OSError as error:
        raise ConfigError(f"--upstream-ca {ca}: {error.strerror or error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
