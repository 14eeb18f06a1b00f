from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.torch_engine.detokenizer import (
    MAX_PENDING_TOKENS,
    ByteTextDecoder,
    Detokenizer,
    StopStrings,
    WindowTextDecoder,
    incomplete_suffix,
)
from engine_adapter.torch_engine.tokenizer import Tokenizer

TEXT = "Grüße, 世界! 👩‍🚀 naïve – ok"


def one_byte(token_id: int) -> bytes:
    return bytes([token_id])


def test_no_character_is_said_before_it_is_whole() -> None:
    decoder = ByteTextDecoder(one_byte)
    pieces = [decoder.push(byte) for byte in TEXT.encode()]
    assert "".join(pieces) == TEXT
    assert all("�" not in piece for piece in pieces)
    assert decoder.finish() == ""


@pytest.mark.parametrize("cut", range(1, len(TEXT.encode())))
def test_a_text_cut_into_two_tokens_anywhere(cut: int) -> None:
    tokens = [TEXT.encode()[:cut], TEXT.encode()[cut:]]
    decoder = ByteTextDecoder(tokens.__getitem__)
    assert decoder.push(0) + decoder.push(1) + decoder.finish() == TEXT


@given(st.binary(max_size=24))
def test_bad_bytes_read_as_python_reads_them_whole(raw: bytes) -> None:
    decoder = ByteTextDecoder(one_byte)
    assert "".join(map(decoder.push, raw)) + decoder.finish() == raw.decode("utf-8", "replace")


def test_pieces_joined_are_the_tokenizers_own_decoding(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    for _ in range(50):
        ids = [rng.randrange(1024) for _ in range(40)]
        for skip in (True, False):
            decoder = tokenizer.text_decoder([], skip_special_tokens=skip)
            text = "".join(map(decoder.push, ids)) + decoder.finish()
            assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_prompt_that_ends_within_a_character_is_completed() -> None:
    raw = "界".encode()
    decoder = ByteTextDecoder(one_byte, prompt_token_ids=list(b"abc" + raw[:2]))
    assert decoder.push(raw[2]) == "界"


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        (b"", b""),
        (b"abc", b""),
        ("é".encode(), b""),
        ("é".encode()[:1], b"\xc3"),
        (b"x" + "😀".encode()[:3], b"\xf0\x9f\x98"),
        (b"\x80\x80\x80\x80\x80", b""),
    ],
)
def test_incomplete_suffix(text: bytes, suffix: bytes) -> None:
    assert incomplete_suffix(text) == suffix


def window_decode(ids: object) -> str:
    """Like a sentencepiece decoder: drops one leading space of whatever it is given."""
    return bytes(ids).decode("utf-8", "replace").removeprefix(" ")  # type: ignore[call-overload,no-any-return]


def test_the_window_keeps_the_space_after_the_prompt_and_waits_for_characters() -> None:
    decoder = WindowTextDecoder(window_decode, prompt_token_ids=list(b"prompt"))
    pieces = [decoder.push(byte) for byte in " é x".encode()]
    assert "".join(pieces) == " é x"
    assert all("�" not in piece for piece in pieces)


def test_the_window_does_not_wait_for_ever() -> None:
    decoder = WindowTextDecoder(window_decode, prompt_token_ids=[65])
    pieces = [decoder.push(0x80) for _ in range(MAX_PENDING_TOKENS)]
    assert "".join(pieces) == "�" * MAX_PENDING_TOKENS


def run_stops(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    scanner = StopStrings(stops, include_in_output=include)
    said = ""
    for piece in pieces:
        said += scanner.push(piece)
        if scanner.hit is not None:
            return said, scanner.hit
    return said + scanner.finish(), scanner.hit


@pytest.mark.parametrize(
    ("text", "stops", "said", "hit"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["twice", "tw"], "one ", "tw"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("end. Next", [". N", "d."], "en", "d."),
        ("xyz", ["yz", "z"], "x", "yz"),
        ("no stop", ["stopped"], "no stop", None),
        ("世界", ["界"], "世", "界"),
    ],
)
def test_stop_strings_don_t_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], said: str, hit: str | None
) -> None:
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        pieces, start = [], 0
        for position, cut in enumerate(cuts, start=1):
            if cut:
                pieces.append(text[start:position])
                start = position
        pieces.append(text[start:])
        assert run_stops(pieces, stops) == (said, hit)
        assert run_stops(pieces, stops, include=True) == (said + (hit or ""), hit)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    scanner = StopStrings(["stop"])
    assert scanner.push("a s") == "a "
    assert scanner.push("o") == "so"
    assert scanner.push("sto") == ""
    assert scanner.finish() == "sto"


def test_stop_strings_wait_for_min_tokens() -> None:
    decoder = ByteTextDecoder(one_byte)
    detokenizer = Detokenizer(decoder, StopStrings(["b"]), min_tokens=3)
    assert detokenizer.push(list(b"abbab")) == "abba"
    assert detokenizer.stop_hit == "b"


def test_a_stop_string_may_begin_within_min_tokens() -> None:
    detokenizer = Detokenizer(ByteTextDecoder(one_byte), StopStrings(["bc"]), min_tokens=2)
    assert detokenizer.push(list(b"abc")) == "a"
    assert detokenizer.stop_hit == "bc"


def test_the_end_gives_what_was_held_back() -> None:
    detokenizer = Detokenizer(ByteTextDecoder(one_byte), StopStrings(["xyz"]))
    assert detokenizer.push(list(b"ax")) == "a"
    assert detokenizer.push([0xC3]) == ""
    assert detokenizer.finish() == "x�"
