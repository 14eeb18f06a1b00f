"""What pydantic found wrong with a file, as lines that name the key as the file has it, and the nearest right one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from engine_adapter.cluster.errors import nearest


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
    return f"{name} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def key_of(where: tuple[str | int, ...]) -> str:
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
