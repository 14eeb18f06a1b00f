from __future__ import annotations

import pytest

from sidecar.transfer import TRANSITIONS, Happening, IllegalTransition, Progress, State


@pytest.mark.parametrize("happening", Happening)
@pytest.mark.parametrize("state", State)
def test_every_cell_of_the_table(state: State, happening: Happening) -> None:
    progress = Progress()
    progress.state = state
    after = TRANSITIONS.get((state, happening))
    if after is None:
        with pytest.raises(IllegalTransition, match=f"{happening} while {state}"):
            progress.step(happening)
        assert progress.state is state
    else:
        assert progress.step(happening) is after is progress.state


def test_a_copy_that_was_interrupted_ends_only_by_stopping() -> None:
    ways = {cell: after for cell, after in TRANSITIONS.items() if cell[0] is State.STOPPING}
    assert ways == {(State.STOPPING, Happening.STOPPED): State.ENDED}
    assert TRANSITIONS[State.COPYING, Happening.INTERRUPTED] is State.STOPPING


def test_the_end_is_final_and_reachable_from_everywhere() -> None:
    assert not [cell for cell in TRANSITIONS if cell[0] is State.ENDED]
    reaching = {State.ENDED}
    for _ in State:
        reaching |= {before for (before, _), after in TRANSITIONS.items() if after in reaching}
    assert reaching == set(State)
