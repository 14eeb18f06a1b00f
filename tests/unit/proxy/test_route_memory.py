from __future__ import annotations

from proxy.route_memory import FORGET_S, MAX_ENTRIES, RouteMemory


def test_what_an_instance_lacks_is_remembered_for_a_while() -> None:
    memory = RouteMemory()
    memory.note("a", "POST", "/x", 10.0)
    assert memory.lacks("a", "POST", "/x", 10.0)
    assert not any(
        memory.lacks(*other, 10.0) for other in (("b", "POST", "/x"), ("a", "GET", "/x"), ("a", "POST", "/"))
    )
    assert memory.lacks("a", "POST", "/x", 9.9 + FORGET_S) and not memory.lacks("a", "POST", "/x", 10 + FORGET_S)


def test_it_is_bounded_and_the_oldest_go_first() -> None:
    memory = RouteMemory()
    for number in range(MAX_ENTRIES):
        memory.note("a", "GET", f"/{number}", 0.0)
    memory.note("a", "GET", "/0", 0.0)
    memory.note("a", "GET", "/more", 0.0)
    assert memory.lacks("a", "GET", "/0", 1.0) and memory.lacks("a", "GET", "/more", 1.0)
    assert not memory.lacks("a", "GET", "/1", 1.0) and memory.lacks("a", "GET", "/2", 1.0)
