"""Command `pd-proxy`. The flags are made from `ProxyConfig`; a wrong one is answered in one line."""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import logging
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from proxy.access_log import LogFormat
from proxy.app import ProxyApp, log_ready, run, run_worker
from proxy.config import ProxyConfig, load_config, nearest
from proxy.errors import ConfigError, StartError
from proxy.freed_memory import FreedMemory
from proxy.listening import listening_sockets
from proxy.workers.supervisor import Supervisor

# The seeds write these in the singular too.
SINGULAR = {
    "prefiller_hosts": "--prefiller-host",
    "prefiller_ports": "--prefiller-port",
    "decoder_hosts": "--decoder-host",
    "decoder_ports": "--decoder-port",
}
REPEATED = frozenset(("api_key", "admin_api_key"))  # given twice, both count
# A request leaves no cycles behind, so collecting every 700 allocations (Python's default) is a search for nothing.
GC_ALLOCATIONS = 50_000


CHECK = "--check-config"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0]
            if not flag.startswith("-"):
                raise ConfigError(f"'{flag}' is not expected here: there are only flags (--help lists them)")
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unknown flag {flag}{nearest(flag, known)}"
        raise ConfigError(message)


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="pd-proxy",
        description="Prefill/decode proxy: picks a prefiller and a decoder for every OpenAI request.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"pd-baton {importlib.metadata.version('pd-baton')}")
    made.add_argument("--config", type=Path, metavar="FILE.toml", help="configuration file; flags override it")
    made.add_argument(CHECK, action="store_true", help="say whether flags and the files they name can be used, and end")
    for name, field in ProxyConfig.model_fields.items():
        flags = ["--" + name.replace("_", "-")]
        if name in SINGULAR:
            flags.append(SINGULAR[name])
        default = field.default
        text = (field.description or "").replace("%", "%%")
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        help_text = f"{text} (default: {shown})" if shown not in ("", False) else text
        if field.annotation is bool:
            made.add_argument(*flags, dest=name, action="store_true", default=argparse.SUPPRESS, help=help_text)
        elif typing.get_origin(field.annotation) is tuple:
            action = "extend" if name in REPEATED else "store"
            made.add_argument(
                *flags, dest=name, nargs="+", action=action, default=argparse.SUPPRESS, metavar="X", help=help_text
            )
        else:
            made.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="X", help=help_text)
    return made


def read_config(argv: Sequence[str]) -> ProxyConfig:
    """Raises ConfigError."""
    flags: dict[str, Any] = vars(parser().parse_args(argv))
    path = flags.pop("config")
    del flags["check_config"]
    if "log_level" in flags:
        flags["log_level"] = flags["log_level"].upper()
    return load_config(path, flags)


async def check(config: ProxyConfig) -> None:
    """All is made that will serve, so what is named is there and fits. Raises ConfigError."""
    ProxyApp(config, asyncio.get_running_loop())


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    try:
        config = read_config(words)
        if CHECK in words:
            asyncio.run(check(config))
            print("pd-proxy: the configuration can be used")
            return
    except ConfigError as error:
        print(f"pd-proxy: {error}", file=sys.stderr)
        sys.exit(2)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormat())
    logging.basicConfig(level=config.log_level, handlers=[handler])
    for foreign in ("aiohttp", "asyncio"):
        logging.getLogger(foreign).setLevel(max(logging.WARNING, logging.getLogger().level))
    FreedMemory().keep()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 50)
    try:
        serve(config, lambda: read_config(words))
    except (StartError, ConfigError) as error:  # a file it names, keys or a certificate, may be unusable
        print(f"pd-proxy: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, StartError) else 2)


def serve(config: ProxyConfig, reread: Callable[[], ProxyConfig]) -> None:
    """Until told to stop. Several workers have a parent, one has none. Raises StartError."""
    if config.workers == 1:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(config, reread))
        return
    listeners = listening_sockets(config.host, config.port, config.listen_backlog)
    supervisor = Supervisor(config, listeners, lambda seat: run_worker(seat, config, reread))
    log_ready(config)
    if status := supervisor.run():
        sys.exit(status)


if __name__ == "__main__":
    main()
