"""SIGHUP: the configuration is read again. What can change at run time does; the rest is named."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable

from proxy.access import Access
from proxy.config import INSTANCE_KEYS, ProxyConfig
from proxy.errors import ConfigError
from proxy.instance import Role
from proxy.membership import Membership
from proxy.tls import load_certificate

log = logging.getLogger(__name__)
# What may change besides who the instances are; certificates where there were some.
KEY_KEYS = ("api_key", "api_key_file", "admin_api_key", "admin_api_key_file")
TLS_KEYS = ("tls_cert", "tls_key")


def reload(
    running: ProxyConfig,
    old: ProxyConfig,
    reread: Callable[[], ProxyConfig],
    membership: Membership,
    access: Access,
    tls: ssl.SSLContext | None,
) -> ProxyConfig:
    """What was read, or `old` (what was read last) if that cannot be used. `running` is what cannot change."""
    try:
        new = reread()
        _check_lists_are_there(old, new)
        if tls is not None and new.tls_cert:
            load_certificate(tls, new)
        access.reload(new)
    except ConfigError as error:
        log.error("event=reload_failed reason=%r", str(error))
        return old
    followed = {*INSTANCE_KEYS, *KEY_KEYS, *(TLS_KEYS if tls is not None else ())}
    others = [key for key in ProxyConfig.model_fields if key not in followed]
    fixed = [key for key in others if getattr(running, key) != getattr(new, key)]
    num_added = num_removed = 0
    for role, was, is_now in (
        (Role.PREFILL, old.prefillers, new.prefillers),
        (Role.DECODE, old.decoders, new.decoders),
    ):
        leaving, joining = [one for one in was if one not in is_now], [one for one in is_now if one not in was]
        num_added += membership.replace(role, leaving, joining)
        num_removed += len(leaving)
    log.info("event=reloaded added=%d removed=%d", num_added, num_removed)
    if fixed:
        log.warning("event=reload_needs_restart keys=%s", ",".join(fixed))
    return new


def _check_lists_are_there(old: ProxyConfig, new: ProxyConfig) -> None:
    """Raises ConfigError for a file that lost a list (it may be half written): defaults are not what was meant."""
    for key in ("prefiller_hosts", "decoder_hosts"):
        if key in old.model_fields_set and key not in new.model_fields_set:
            raise ConfigError(f"{key} is not there any more; write {key} = [] if there are to be none")
