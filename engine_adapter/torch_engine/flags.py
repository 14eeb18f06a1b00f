"""Command-line flags made from pydantic models: one a field, with the field's default, bounds and docstring."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Iterable
from importlib.metadata import version
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

EXIT_USAGE = 2
SIZE_UNITS = {"": 1, "B": 1, "K": 1000, "KB": 1000, "KIB": 1024, "M": 1000**2, "MB": 1000**2, "MIB": 1024**2,
              "G": 1000**3, "GB": 1000**3, "GIB": 1024**3}  # fmt: skip

ALIASES = {"gpu": "cuda", "nvidia": "cuda", "ascend": "npu"}  # what is meant by words that are spelt like others

Config = TypeVar("Config", bound=BaseModel)


class UsageParser(argparse.ArgumentParser):
    """Says a wrong flag in one line, with the nearest right one, and exits with 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse has it, with the nearest right value."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(known)}{nearest(str(value), known)}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, but a misspelt flag is said before a missing one, which is most often the same."""
        if self._subparsers is None:
            words = [word.partition("=")[0] for word in args or ()]
            misspelt = [word for word in words if word.startswith("--") and word not in self._option_string_actions]
            if misspelt and misspelt[0] != "--":
                self.unknown(misspelt, self)
        return super().parse_known_args(args, namespace)

    def unknown(self, words: Iterable[str], meant: UsageParser) -> NoReturn:
        """Refuse leftover arguments of the command `meant`."""
        word = next(iter(words)).partition("=")[0]
        if not word.startswith("-"):
            meant.error(f"unexpected argument {word!r} (see {meant.prog} --help)")
        flags = [flag for action in meant._actions for flag in action.option_strings]
        meant.error(f"unknown flag {word}{nearest(word, flags)}")


def nearest(word: str, known: Collection[str]) -> str:
    """`; did you mean X?`, or nothing where no known word is like it."""
    found = (
        [ALIASES[word]] if ALIASES.get(word) in known else difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    )
    return f"; did you mean {found[0]}?" if found else ""


def add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"pd-baton {version('pd-baton')}")


def add_flags(parser: argparse.ArgumentParser, config: type[BaseModel], title: str) -> None:
    """One flag a field of `config`; its values are checked by `read_flags`."""
    group = parser.add_argument_group(title)
    for name, field in config.model_fields.items():
        flag = "--" + name.replace("_", "-")
        text = _help(field)
        if get_origin(field.annotation) is tuple:
            group.add_argument(flag, nargs="+", metavar="TEXT", default=argparse.SUPPRESS, help=text)
        elif field.annotation is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(
                flag, metavar=_metavar(name, field), required=field.is_required(), default=argparse.SUPPRESS, help=text
            )


def read_flags(parser: argparse.ArgumentParser, config: type[Config], given: argparse.Namespace) -> Config:
    """The configuration out of the parsed flags. Exits with 2 and one line where a value is wrong."""
    values: dict[str, Any] = {name: value for name, value in vars(given).items() if name in config.model_fields}
    for name, value in values.items():
        if name.endswith("_bytes") and isinstance(value, str):
            values[name] = _size(parser, name, value)
    try:
        return config.model_validate(values)
    except ValidationError as error:
        parser.error(_problem(config, dict(error.errors(include_url=False)[0])))


def _problem(config: type[BaseModel], problem: dict[str, Any]) -> str:
    name = str(problem["loc"][0])
    flag = "--" + name.replace("_", "-")
    choices = _choices(config.model_fields[name])
    if choices:
        hint = nearest(str(problem["input"]), choices)
        return f"{flag} {problem['input']!r} is none of {', '.join(choices)}{hint}"
    return f"{flag} {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _size(parser: argparse.ArgumentParser, name: str, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in SIZE_UNITS:
        parser.error(f"--{name.replace('_', '-')} {text!r} is no size: write bytes, or 256MiB, or 2GiB")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def _choices(field: FieldInfo) -> tuple[str, ...]:
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def _metavar(name: str, field: FieldInfo) -> str:
    choices = _choices(field)
    if choices:
        return "{" + ",".join(choices) + "}"
    if name.endswith("_bytes"):
        return "SIZE"
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    words = {"float": "X", "str": "TEXT", "Path": "DIR"}
    return next((words[name] for kind in kinds if (name := getattr(kind, "__name__", "")) in words), "N")


def _help(field: FieldInfo) -> str:
    text = (field.description or "").strip().replace("\n", " ").replace("%", "%%")
    return text if field.is_required() or field.default in (None, ()) else f"{text} [{field.default}]".strip()
