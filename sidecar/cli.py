"""Command `pd-sidecar`: flags from the config's fields, then the daemon."""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

import uvloop
from pydantic import ByteSize, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from sidecar.config import SidecarConfig
from sidecar.daemon import run
from sidecar.errors import StartError, UsageError

logger = logging.getLogger(__name__)


NEAREST = {"rdma": "mooncake --mooncake-protocol rdma", "ascend": "mooncake --mooncake-protocol ascend"}
"""What people mean by values that look like nothing of ours."""


class _Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing a page, with the nearest right value."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = list(action.choices or ())
        if not choices or value in choices:
            return
        near = difflib.get_close_matches(str(value), choices, 1, 0.5)
        hint = NEAREST.get(str(value), "") if "mooncake" in choices else ""
        hint = hint or (near[0] if near else "")
        meant = f"; did you mean {action.option_strings[0]} {hint}?" if hint else ""
        raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {', '.join(choices)}){meant}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """One flag for each field of SidecarConfig."""
    flags = _Parser(
        prog="pd-sidecar",
        description="Moves KV blocks between this engine and others. One process beside each engine rank.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    version = importlib.metadata.version("pd-baton")
    flags.add_argument("--version", action="version", version=f"pd-baton {version}")
    for name, field in SidecarConfig.model_fields.items():
        flags.add_argument(_flag(name), dest=name, **_options(field))
    return flags


def config_from(arguments: Sequence[str]) -> SidecarConfig:
    """The config that a command line means. Raises UsageError in one line."""
    flags = parser()
    for word in arguments:  # before argparse, which would rather speak of a required flag that is missing because of it
        if word.startswith("--") and word.partition("=")[0] not in flags._option_string_actions:
            raise _unknown(flags, word)
    known, unknown = flags.parse_known_args(arguments)
    if unknown:
        raise _unknown(flags, unknown[0])
    try:
        return SidecarConfig(**{name: value for name, value in vars(known).items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{_flag(str(first['loc'][0]))} {first['input']}: {first['msg']}") from error


def _unknown(flags: argparse.ArgumentParser, word: str) -> UsageError:
    near = difflib.get_close_matches(word.partition("=")[0], list(flags._option_string_actions), 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else "; see pd-sidecar --help"
    return UsageError(f"unknown argument {word}{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sidecar; returns the exit status."""
    try:
        config = config_from(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(
            level=config.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(config))
    except UsageError as error:
        print(f"pd-sidecar: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"pd-sidecar: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(field: FieldInfo) -> dict[str, Any]:
    options: dict[str, Any] = {"help": field.description}
    if field.annotation is bool:
        return options | {"action": "store_true"}
    default = field.get_default(call_default_factory=True, validated_data={})
    options |= {"required": True} if field.is_required() else {"default": default}
    if get_origin(field.annotation) is Literal:
        return options | {"choices": get_args(field.annotation)}
    if ByteSize in (field.annotation, *get_args(field.annotation)):
        return options | {"type": _size, "metavar": "SIZE"}
    return options | {"type": field.annotation, "metavar": str(getattr(field.annotation, "__name__", "value")).upper()}


def _size(text: str) -> int:
    """Bytes, or a number with a unit."""
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or 256MiB, or 2GiB") from error


if __name__ == "__main__":
    sys.exit(main())
