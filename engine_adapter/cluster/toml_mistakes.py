"""What pydantic found wrong with a file, as lines that name the key as the file has it, and the nearest right one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from engine_adapter.cluster.errors import nearest

Where = tuple[str | int, ...]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
HOST_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9.-]*$|^[0-9A-Fa-f:.]+$"
FLAG_PATTERN = r"^-{0,2}[A-Za-z0-9][A-Za-z0-9_-]*$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
TEXT_PATTERN = r"^[^\x00\n]*$"
VERSION_PATTERN = r"^\d+\.\d+(\.\d+)?(rc\d+|\.post\d+)?$"
NIC_PATTERN = r"^[A-Za-z0-9._@:-]+$"
PATH_PATTERN = r"^/[A-Za-z0-9/_.-]+$"

PATTERNS = {
    NAME_PATTERN: "give letters, digits, dots, underscores and dashes, first a letter or a digit",
    HOST_PATTERN: "give a host's name or IP address, without port or blanks",
    FLAG_PATTERN: "give a flag's name, without its value",
    VARIABLE_PATTERN: "give a variable's name: letters, digits and underscores, first no digit",
    TEXT_PATTERN: "give one line",
    VERSION_PATTERN: "give a version such as 0.11.0",
    NIC_PATTERN: "give a network card's name, such as eth0",
    PATH_PATTERN: "give the path of a URL, from its slash on",
}
"""What text must be like in a file, in words."""

_WORDS = {
    "tuple_type": "give a list; of a section, write its name as [[name]]",
    "list_type": "give a list",
    "dict_type": "give a table",
    "model_type": "give a table",
    "model_attributes_type": "give a table",
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "string_type": "give text, in quotes",
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
}


def lines_of(values: Any, details: Sequence[Any], root: type[BaseModel]) -> list[str]:
    """A line for each mistake in `values`; what fits none of several types is one mistake."""
    lines = []
    for detail in details:
        where = _in_file(values, detail["loc"])
        alternatives = [other["type"] for other in details if _in_file(values, other["loc"]) == where]
        if len(alternatives) > 1 and "extra_forbidden" not in alternatives:
            words = "give text, a number or false" if "literal_error" in alternatives else "give one of another type"
            lines.append(f"{key_of(where)} = {detail['input']!r}: {words}")
        else:
            lines.append(line_of(detail, root))
    return list(dict.fromkeys(lines))


def without(values: Any, details: Sequence[Any]) -> tuple[Any, list[Where]]:
    """`values` with what is wrong taken out, and where that was."""
    places = list(dict.fromkeys(_in_file(values, detail["loc"]) for detail in details if detail["type"] != "missing"))
    for where in reversed(places):  # of a list the later ones first
        holder = values
        for part in where[:-1]:
            holder = holder[part]
        del holder[where[-1]]
    return values, places


def _in_file(values: Any, where: Where) -> Where:
    """As far as the file has it: behind it pydantic names the alternatives of a type."""
    for depth, part in enumerate(where):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return where[:depth]
    return where


def line_of(detail: Any, root: type[BaseModel]) -> str:
    """One entry of `ValidationError.errors()` of `root` as one line."""
    where, key = detail["loc"], str(detail["loc"][-1])
    name = key_of(where)
    if detail["type"] == "extra_forbidden":
        return f'unknown key "{name}"; {nearest(key, _section_at(where[:-1], root).model_fields)}'
    if detail["type"] == "missing":
        return f'key "{name}" is missing'
    if detail["type"] == "literal_error":
        known = detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{name} = {detail['input']!r} is not known; {nearest(str(detail['input']), known)}"
    if detail["type"] == "string_pattern_mismatch":
        words = PATTERNS.get(detail["ctx"]["pattern"], f"it is not of the form {detail['ctx']['pattern']}")
        return f"{name.removesuffix('.[key]')} = {detail['input']!r}: {words}"
    words = _WORDS.get(detail["type"], f"{detail['msg'][0].lower()}{detail['msg'][1:]}")
    return f"{name} = {detail['input']!r}: {words}"


def key_of(where: Where) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")


def _section_at(where: tuple[str | int, ...], root: type[BaseModel]) -> type[BaseModel]:
    section = root
    for part in where:
        if isinstance(part, str):
            section = next(_sections_in(section.model_fields[part].annotation))
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            yield candidate
