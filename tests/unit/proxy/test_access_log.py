from __future__ import annotations

import io
import json
import re

import pytest

from proxy.access_log import FIELDS, MAX_HELD_LINES, MAX_WORD_CHARS, AccessLog, Value
from proxy.report import output_tokens_of

STREAM: dict[str, Value] = {
    "request_id": "r-1", "route": "chat", "model": "org/model-7B", "stream": 1, "status": 200, "outcome": "ok",
    "prompt_tokens": 12, "output_tokens": 34, "queue_s": 0.001, "prefill_s": 0.25, "handoff_s": 0.01, "ttft_s": 0.261,
    "e2e_s": 2.0, "prefiller": "p:1", "decoder": "d:1", "retries": 1, "continued": 0, "prefill_choice": "least_load",
    "prefill_wait_s": 0.5, "prefill_next_wait_s": 0.75, "decode_choice": "session", "decode_wait_s": 1.0,
    "decode_next_wait_s": 0.5,
}  # fmt: skip


def line_of(form: str, **changes: Value) -> str:
    stream = io.StringIO()
    log = AccessLog(form, stream)  # type: ignore[arg-type]
    log.add(tuple({**STREAM, **changes}.values()))
    log.flush()
    line, end, rest = stream.getvalue().partition("\n")
    assert end and not rest
    return line


def words_of(line: str) -> dict[str, str]:
    found = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} INFO proxy\.access (.*)", line)
    assert found, line
    return dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)', found[1]))


def test_the_fields_are_in_order() -> None:
    assert tuple(STREAM) == FIELDS
    assert tuple(words_of(line_of("text"))) == FIELDS
    assert tuple(json.loads(line_of("json"))) == ("time", "event", *FIELDS)


def test_text_and_json_say_the_same() -> None:
    words, told = words_of(line_of("text")), json.loads(line_of("json"))
    assert words["ttft_s"] == "0.2610" and told["ttft_s"] == 0.261
    assert words["stream"] == "1" and told["stream"] is True and told["continued"] is False
    for name in ("model", "route", "prefiller", "prefill_choice"):
        assert words[name] == told[name] == STREAM[name]


ALONE = ("output_tokens", "queue_s", "prefill_s", "handoff_s", "e2e_s", "prefiller", "decoder", "prefill_next_wait_s")
WHOLE = {"handoff_s", "ttft_s"}


@pytest.mark.parametrize(
    "missing", [*({name} for name in ALONE), WHOLE, {"decoder"} | WHOLE, set(FIELDS[7:]) - {"retries"}]
)
def test_what_is_unknown_is_a_dash_or_null(missing: set[str]) -> None:
    nothing = dict.fromkeys(missing)
    words, told = words_of(line_of("text", **nothing)), json.loads(line_of("json", **nothing))
    assert tuple(words) == FIELDS
    assert {name for name, word in words.items() if word == "-"} == missing
    assert {name for name, value in told.items() if value is None} == missing - {"continued"}
    assert words["e2e_s"] == ("-" if "e2e_s" in missing else "2.0000")


@pytest.mark.parametrize(
    "model",
    [
        "two words",
        'quo"te',
        "x\nfake outcome=ok",
        "x=1",
        "back\\slash",
        "\x1b[31mred",
        "数",
        "\u2028",
        "m" * 5000,
        'a\\" b=c',
    ],
)
def test_no_name_can_forge_a_line(model: str) -> None:
    log = AccessLog("text")
    words = words_of(line_of("text", model=log.word(model)))
    assert tuple(words) == FIELDS and words["outcome"] == "ok"
    assert words["model"].isascii() and words["model"].isprintable() and len(words["model"]) <= 8 * MAX_WORD_CHARS
    told = json.loads(line_of("json", model=AccessLog("json").word(model)))
    assert told["model"] == (model if len(model) < MAX_WORD_CHARS else model[: MAX_WORD_CHARS - 1] + "~")


@pytest.mark.parametrize("sent", [None, "", 7, ["m"]])
def test_a_model_that_is_none(sent: object) -> None:
    assert (AccessLog("text").word(sent), AccessLog("json").word(sent)) == ("-", None)


def test_it_is_bounded_and_ends_where_nobody_reads() -> None:
    stream = io.StringIO()
    log = AccessLog("text", stream)
    for _ in range(MAX_HELD_LINES + 1):
        log.add(tuple(STREAM.values()))
    assert len(stream.getvalue().splitlines()) == MAX_HELD_LINES + 1
    log.add(tuple(STREAM.values()))
    stream.close()
    log.flush()
    assert not log.enabled


@pytest.mark.parametrize(
    ("answer", "num"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":5,"total_tokens":12,"completion_tokens":7}}', 7),
        (b'{"usage": {"input_tokens": 3, "output_tokens": 4}}', 4),
        (b'{"usage":{"prompt_tokens":5}}', None),
        (b'{"usage":{"completion_tokens":9}}' + b" " * 5000, None),
        (b"", None),
    ],
)
def test_output_tokens_of_a_whole_answer(answer: bytes, num: int | None) -> None:
    assert output_tokens_of(answer) == num
