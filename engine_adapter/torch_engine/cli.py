"""`pd-engine`: serve a model over the OpenAI API, or make a small model to serve."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from engine_adapter.torch_engine.config import EngineConfig, EngineStartError
from engine_adapter.torch_engine.flags import UsageParser, add_flags, add_version, nearest, read_flags
from engine_adapter.torch_engine.server_config import ServerConfig

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_moe", "qwen2_5_vl")
SIZES = ("tiny", "small")
IMPLEMENTATIONS = {
    "serve": "engine_adapter.torch_engine.server:serve",
    "make-model": "engine_adapter.torch_engine.make_model_command:make_model_directory",
}
"""Import strings, so that --help and a mistyped flag are answered without loading torch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 it can't be done, 2 it was asked for wrongly."""
    parser, commands = _parsers()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in commands:
        parser.error(f"unknown command {words[0]!r}{nearest(words[0], commands)}")
    given, unknown = parser.parse_known_args(words)
    command: str = given.command
    if unknown:
        parser.unknown(unknown, commands[command])
    arguments = _arguments(command, commands[command], given)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _implementation(command)(*arguments)
    except EngineStartError as error:
        print(f"pd-engine: {error.message}: {error.remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM before anything serves ends the command as Ctrl-C does: what was begun is undone, exit 0."""
    raise KeyboardInterrupt


def _parsers() -> tuple[UsageParser, dict[str, UsageParser]]:
    parser = UsageParser(prog="pd-engine", description=__doc__)
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{serve,make-model}")
    serve = commands.add_parser("serve", help="serve a model directory", description="Serve a model directory.")
    add_flags(serve, EngineConfig, "engine")
    add_flags(serve, ServerConfig, "server")
    make = commands.add_parser(
        "make-model", help="write a small model with seeded random weights", description="Write a small model."
    )
    make.add_argument("directory", type=Path, metavar="DIR", help="where to; must be absent or empty")
    make.add_argument("--family", choices=FAMILIES, default="qwen3", help="architecture [qwen3]")
    make.add_argument("--size", choices=SIZES, default="tiny", help="[tiny]")
    make.add_argument("--seed", type=int, default=0, help="of the weights [0]")
    return parser, {"serve": serve, "make-model": make}


def _arguments(command: str, parser: UsageParser, given: argparse.Namespace) -> tuple[Any, ...]:
    if command == "serve":
        return read_flags(parser, ServerConfig, given), read_flags(parser, EngineConfig, given)
    return given.directory, given.family, given.size, given.seed


def _implementation(command: str) -> Callable[..., int]:
    module, _, name = IMPLEMENTATIONS[command].partition(":")
    implementation: Callable[..., int] = getattr(importlib.import_module(module), name)
    return implementation


if __name__ == "__main__":
    sys.exit(main())
