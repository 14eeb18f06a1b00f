"""What a plan says otherwise than its seed, and what the deployment file's comment says of that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine_adapter.cluster.processes import DeploymentPlan, Process
from tests.unit.cluster.seeds.extract import OUTER, facts_of

NONE = "(none)"
JSON_FLAGS = ("--kv-transfer-config", "--additional-config", "--speculative-config", "--compilation-config", "-d")


@dataclass(frozen=True, order=True)
class Difference:
    who: str
    """Name of a process, or proxy, request, bench, files."""
    what: str
    seed: str
    ours: str

    def __str__(self) -> str:
        return f"{self.who} {self.what}: {self.seed} -> {self.ours}"


@dataclass(frozen=True)
class Said:
    """A line of the comment: `# differs: WHO WHAT[, WHAT]: SEED -> OURS; WHY`, with * for any text."""

    who: str
    what: tuple[str, ...]
    seed: str
    ours: str
    why: str

    def covers(self, difference: Difference) -> bool:
        return (
            _fits(self.who, difference.who)
            and any(_fits(what, difference.what) for what in self.what)
            and _fits(self.seed, difference.seed)
            and _fits(self.ours, difference.ours)
        )


def _fits(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text) is not None


def said_in(text: str) -> list[Said]:
    """A line that is too long goes on in the next ones, indented."""
    joined = re.sub(r"\n#   +", " ", text)
    lines = re.findall(r"^# differs: (\S+) (.+?): (\S.*?) -> (.+?); (.+)$", joined, re.MULTILINE)
    assert len(lines) == joined.count("# differs:"), (
        "a line `# differs:` is not of the form WHO WHAT: SEED -> OURS; WHY"
    )
    return [Said(who, tuple(what.split(", ")), seed, ours, why) for who, what, seed, ours, why in lines]


def differences(facts: Mapping[str, Any], plan: DeploymentPlan) -> Iterator[Difference]:
    processes = {process.name: process for process in plan.processes if process.name != "proxy"}
    if "roles" in facts:
        for name, process in processes.items():
            yield from _between(name, facts["roles"][process.role], process, partial=True)
        return
    for name in sorted({*facts["processes"], *processes}):
        seed, ours = facts["processes"].get(name), processes.get(name)
        if seed is None or ours is None or not seed.get("listed", True):
            yield Difference(
                name, "process", NONE if seed is None or not seed.get("listed", True) else "there", "there"
            )
        if seed is not None and ours is not None:
            yield from _between(name, seed, ours)
    yield from _commands("proxy", facts["proxy"], plan.proxy.argv)
    if "request" in facts:
        yield from _commands("request", facts["request"], plan.request)
    if "bench" in facts:
        yield from _commands("bench", facts["bench"], plan.bench.argv if plan.bench else ())
    if "bench_model" in facts:
        assert plan.bench is not None
        ours = dict(re.findall(r"^ +(\w+)=\"?([^\",\n]+)", plan.bench.files[0].text or "", re.MULTILINE))
        yield from _unlike("bench", facts["bench_model"], {key: ours.get(key, NONE) for key in facts["bench_model"]})
    for name, text in facts.get("files", {}).items():
        texts = [file.text for process in processes.values() for file in process.files if file.path.endswith(name)]
        yield from _unlike("files", {name: _plain(text)}, {name: _plain(texts[0] or "")})


def _plain(text: str) -> str:
    return str(json.loads(text)) if text.startswith("{") else text


def _between(name: str, seed: Mapping[str, Any], process: Process, partial: bool = False) -> Iterator[Difference]:
    ours = facts_of(list(process.argv), process.environment(OUTER))
    theirs, own = flat(seed), flat(ours)
    if partial:
        theirs.pop("program")
        own = {key: value for key, value in own.items() if key in theirs}
    yield from _unlike(name, theirs, own)


def _commands(who: str, seed: Sequence[str], ours: Sequence[str]) -> Iterator[Difference]:
    yield from _unlike(who, flat_argv(seed), flat_argv(ours))


def _unlike(who: str, seed: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[Difference]:
    for key in sorted({*seed, *ours}):
        if seed.get(key) != ours.get(key):
            yield Difference(who, key, seed.get(key, NONE), ours.get(key, NONE))


def flat(facts: Mapping[str, Any]) -> dict[str, str]:
    env = {f"env {key}": str(value) for key, value in facts["env"].items()}
    return {**flat_argv(facts["argv"]), **env, **{f"env {key}": "(unset)" for key in facts["unset"]}}


def flat_argv(argv: Sequence[str]) -> dict[str, str]:
    """Flags with their values, JSON taken apart; a repeated flag's last value, as argparse has it."""
    found: dict[str, list[str]] = {"program": []}
    flag = "program"
    for word in argv:
        if re.match(r"--?[a-z]", word):
            flag = word
            found[flag] = []
        else:
            found[flag].append(word)
    apart: dict[str, str] = {}
    for flag, values in found.items():
        if flag in JSON_FLAGS:
            apart |= dict(_leaves(json.loads(values[0]), flag))
        else:
            apart[flag] = " ".join(values) or "true"
    return apart


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, str(value) if isinstance(value, str) else json.dumps(value)
