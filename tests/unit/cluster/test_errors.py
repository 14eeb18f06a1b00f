from __future__ import annotations

from engine_adapter.cluster.errors import ClusterError, nearest


def test_the_nearest_word_or_all_of_them() -> None:
    assert nearest("prot", ["port", "host"]) == 'did you mean "port"?'
    assert nearest("xyz", ["port", "host"]) == "known here: host, port"


def test_an_error_reads_as_its_problems() -> None:
    assert str(ClusterError("one", "two")) == "one; two"
