"""Which trace contexts are kept, by the rules of W3C Trace Context, section 3.2.2."""

from __future__ import annotations

import pytest

from proxy import trace

IDS = b"0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"00-" + IDS + b"-00", b"00-" + IDS + b"-00"),
        (b"00-" + IDS + b"-03", b"00-" + IDS + b"-03"),
        (b"cc-" + IDS + b"-03", b"00-" + IDS + b"-01"),
        (b"cc-" + IDS + b"-02-what-the-future-says", b"00-" + IDS + b"-00"),
        (b"cc-" + IDS + b"-02.", b""),
        (b"00-" + IDS + b"-01-more", b""),
        (b"ff-" + IDS + b"-01", b""),
        (b"00-" + b"0" * 32 + IDS[32:] + b"-01", b""),
        (b"00-" + IDS[:33] + b"0" * 16 + b"-01", b""),
        (b"00-" + IDS.upper() + b"-01", b""),
        (b"00-" + IDS + b"-01\n", b""),
        (b"", b""),
    ],
)
def test_kept(given: bytes, kept: bytes) -> None:
    assert trace.kept(given) == kept


def test_made_ones_are_kept_and_differ() -> None:
    many = {trace.made() for _ in range(1000)}
    assert len({one[3:35] for one in many}) == 1000 and all(trace.kept(one) == one for one in many)
