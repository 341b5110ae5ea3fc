"""What a search has measured is measured once, also when it is started again; and only for the same search."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuning.errors import TuningError
from tuning.planning.state import State


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path, settings = tmp_path / "plan.search.json", {"steps": 20, "size": (64, 64)}
    state = State(path, settings)
    assert len(state) == 0
    assert state.get("error a", lambda: 0.1) == 0.1
    assert state.get("error b", lambda: float("inf")) == float("inf")
    again = State(path, settings)
    assert len(again) == 2
    assert again.get("error a", lambda: pytest.fail("measured twice")) == 0.1
    assert again.get("error b", lambda: pytest.fail("measured twice")) == float("inf")
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.search.json"
    State(path, {"steps": 20}).get("error a", lambda: 0.1)
    with pytest.raises(TuningError, match="holds a search with steps 20, and this one has 10: give the same to resume it"):
        State(path, {"steps": 10})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": [], "values": {"a": "x"}}', '{"settings": 3, "values": {}}'])
def test_a_damaged_state_is_said_to_be_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.search.json"
    path.write_text(text)
    with pytest.raises(TuningError, match="no state of a search that can be read.*delete it to start anew"):
        State(path, {"steps": 10})
