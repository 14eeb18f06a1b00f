"""Environment and commands as bash takes them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

from engine_adapter.cluster.processes import REFERENCE

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]*")


def environment_lines(env: Mapping[str, str], unset: Iterable[str], positional: bool = False) -> Iterator[str]:
    """`positional`: a value that is `$1` to `$9` means the script's argument."""
    for name in unset:
        yield f"unset {name}"
    for key, value in env.items():
        if positional and re.fullmatch(r"\$[1-9]", value):
            yield f'export {key}="{value}"'
        else:
            yield f"export {key}={quoted(value)}"


def quoted(value: str) -> str:
    """A value that may refer to the environment, as `processes.expanded` has it."""
    if not REFERENCE.search(value):
        return shlex.quote(value) if value else "''"
    words, end = [], 0
    for match in REFERENCE.finditer(value):
        before, name, behind = match.groups()
        words.append(_escaped(value[end : match.start()]))
        if before and behind:
            words.append(f"${{{name}:+:${name}}}:")
        elif before or behind:
            words.append(f"${{{name}:+{before}${name}{behind}}}")
        else:
            words.append(f"${{{name}-}}")
        end = match.end()
    words.append(_escaped(value[end:]))
    return f'"{"".join(words)}"'


def _escaped(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)


def command_lines(words: Iterable[str], prefix: str = "") -> list[str]:
    """Words that bash takes as they are, a flag with its values a line."""
    lines: list[str] = []
    for word in words:
        if not lines or word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    lines[0] = prefix + lines[0]
    return " \\\n  ".join(lines).split("\n")
