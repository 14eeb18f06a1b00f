"""The id that a client sees, where a leg had an id of its own."""

from __future__ import annotations

import pytest

from proxy.answer_id import renamed, renaming


@pytest.mark.parametrize("prefix", ["", "cmpl-", "chatcmpl-"])
@pytest.mark.parametrize("blank", ["", " "])
def test_an_answers_id(prefix: str, blank: str) -> None:
    answer = f'{{"id":{blank}"{prefix}r-7f","choices":[{{"text":"r-7f"}}]}}'
    assert renamed(answer.encode(), "r-7f", "r").decode() == answer.replace(f'{prefix}r-7f"', f'{prefix}r"', 1)


def test_ids_are_escaped_as_json_has_them() -> None:
    assert renamed(b'{"id":"cmpl-a\\"b-2"}', 'a"b-2', 'a"b') == b'{"id":"cmpl-a\\"b"}'


@pytest.mark.parametrize("answer", [
    b"", b'{"id":"cmpl-other","x":"r-7f"}', b'{"text":"cmpl-r-7f"}', b'{"id":"cmpl-xr-7","text":"r-7f"}',
    b'{"id":"a b r-7f"}', b'{"text":"\\"id\\":\\"cmpl-r-7f"}',
])  # fmt: skip
def test_text_is_left_alone(answer: bytes) -> None:
    assert renaming(answer, "r-7f", "r") is None and renamed(answer, "r-7f", "r") == answer
