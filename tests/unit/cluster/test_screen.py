from __future__ import annotations

import io
import os

from engine_adapter.cluster.backoff import Backoff
from engine_adapter.cluster.config import parse
from engine_adapter.cluster.plan import Site, plan
from engine_adapter.cluster.screen import Screen
from engine_adapter.cluster.supervisor import State, Watched

FILE = '[model]\npath = "m"\n[[instance]]\nrole = "prefill"\n[[instance]]\nrole = "decode"\n'


def all_watched() -> list[Watched]:
    processes = plan(parse(FILE, "f"), Site("m", "/s", 1, tuple(range(17001, 17010)))).processes
    return [Watched(process, Backoff(), State.HEALTHY) for process in processes]


def test_one_line_an_instance_with_role_address_pid_and_state() -> None:
    stream = io.StringIO()
    Screen(stream).instances(all_watched())
    assert stream.getvalue() == (
        "role     instance   address          pid  state    sidecar\n"
        "prefill  prefill-0  127.0.0.1:17001  -    healthy  127.0.0.1:17002 pid - healthy\n"
        "decode   decode-0   127.0.0.1:17004  -    healthy  127.0.0.1:17005 pid - healthy\n"
        "proxy    proxy      127.0.0.1:8000   -    healthy\n"
    )


def test_a_change_stands_with_the_last_lines_of_the_dead() -> None:
    stream = io.StringIO()
    Screen(stream).change(all_watched()[-1], "died", ["one", "x" * 200, "x" * 201])
    first, *rest = stream.getvalue().splitlines()
    assert first.split()[1:] == ["proxy", "127.0.0.1:8000", "died"]
    assert rest == ["    | one", "    | " + "x" * 200, "    | " + "x" * 200 + "…"]


def test_a_reader_that_left_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        screen = Screen(stream)
        screen.line("lost")
        screen.line("and no error")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # let the test's own close succeed
    screen.close()
