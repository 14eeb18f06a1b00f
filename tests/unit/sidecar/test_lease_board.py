from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sidecar.lease_board import BOARD_BYTES, NUM_SLOTS, BoardView, LeaseBoard, mark_of
from sidecar.message import pack_block_ids
from sidecar.regions import reopen_read_only

MARK = mark_of("transfer", "token", pack_block_ids([1, 2, 3]))


@pytest.fixture
def board() -> Iterator[LeaseBoard]:
    board = LeaseBoard()
    yield board
    board.close()


@pytest.fixture
def view(board: LeaseBoard) -> Iterator[BoardView]:
    view = BoardView(reopen_read_only(board.fd))
    yield view
    view.close()


def test_a_mark_is_seen_from_posting_to_taking_off(board: LeaseBoard, view: BoardView) -> None:
    assert not view.holds(MARK)
    assert board.post(MARK, 60.0)
    assert view.holds(MARK) and not view.holds(MARK + NUM_SLOTS)
    assert board.holds(MARK) and not board.holds(MARK + NUM_SLOTS)
    board.take_off(MARK)
    board.take_off(MARK)
    assert not view.holds(MARK) and not board.holds(MARK)


@pytest.mark.parametrize(
    "other",
    [("transfer", "token", [1, 3, 2]), ("transfer", "token", [1, 2]), ("transfer", "guess", [1, 2, 3]),
     ("another", "token", [1, 2, 3]), ("transfe", "rtoken", [1, 2, 3])],
    ids=str,
)  # fmt: skip
def test_a_mark_names_transfer_token_and_blocks(other: tuple[str, str, list[int]]) -> None:
    transfer_id, token, block_ids = other
    assert mark_of(transfer_id, token, pack_block_ids(block_ids)) != MARK
    assert MARK and MARK < 1 << 64


def test_a_board_that_is_too_small_is_not_looked_at() -> None:
    """To touch what lies beyond it would end this process."""
    fd = os.memfd_create("board", os.MFD_CLOEXEC)
    os.ftruncate(fd, BOARD_BYTES - 1)
    with pytest.raises(OSError, match="a lease board has"):
        BoardView(fd)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_taken_slot_is_not_written_over(board: LeaseBoard, view: BoardView) -> None:
    assert board.post(MARK, 60.0)
    assert not board.post(MARK ^ NUM_SLOTS, 60.0)
    board.take_off(MARK ^ NUM_SLOTS)  # has the slot, not the mark
    assert view.holds(MARK)


def test_an_expired_mark_is_void_though_nobody_took_it_off(board: LeaseBoard, view: BoardView) -> None:
    assert board.post(MARK, 0.0)
    assert not view.holds(MARK)


def test_a_closed_board_holds_nothing(view: BoardView, board: LeaseBoard) -> None:
    assert board.post(MARK, 60.0)
    board.close()
    board.close()
    assert not view.holds(MARK) and not board.holds(MARK)


def test_a_closed_view_knows_nothing(board: LeaseBoard) -> None:
    view = BoardView(reopen_read_only(board.fd))
    assert board.post(MARK, 60.0)
    view.close()
    view.close()
    assert not view.holds(MARK)


def test_no_block_id_is_too_large_to_be_packed() -> None:
    assert pack_block_ids([1 << 64]) == b"" and len(pack_block_ids([1, (1 << 64) - 1])) == 16


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_nothing_is_held_for_a_dead_process_once_its_sockets_have_closed(number: signal.Signals) -> None:
    """As its engine sees it, which may write into its blocks from then on; many times, as it is a question of order."""
    script = (
        "import os, socket, sys, time\n"
        "from sidecar.lease_board import LeaseBoard\n"
        "board = LeaseBoard()\n"
        "assert board.post(int(sys.argv[2]), 60.0)\n"
        "channel = socket.socket(fileno=int(sys.argv[1]))\n"
        "socket.send_fds(channel, [b'x'], [os.open(f'/proc/self/fd/{board.fd}', os.O_RDONLY)])\n"
        "time.sleep(60)\n"
    )
    for _ in range(5):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", script, str(theirs.fileno()), str(MARK)], pass_fds=[theirs.fileno()]
            )
            theirs.close()
            _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
            view = BoardView(fd)
            assert view.holds(MARK)
            os.kill(process.pid, number)
            assert ours.recv(1) == b""  # the end of its sockets
            assert not view.holds(MARK)
            view.close()
            process.wait()
