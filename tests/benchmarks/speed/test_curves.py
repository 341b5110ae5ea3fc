"""The curves of time and memory: which points they have, and that a run is resumed."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.speed import curves
from engines.errors import UserError


class Fake:
    """Stands for a process: a call takes its pixels and steps in CPU seconds."""

    calls: ClassVar[list[Any]] = []

    def __init__(self, *given: object) -> None:
        pass

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *given: object) -> None:
        pass

    def picture(self, call: Any) -> dict[str, float]:
        self.calls.append(call)
        if len(self.calls) == 7:
            raise KeyboardInterrupt
        return {"cpu": call.height * call.width * call.steps * call.images / 1000, "peak_mb": 100.0 * call.images}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(curves, "Subject", Fake)
    monkeypatch.setattr(curves, "build", lambda options: None)
    monkeypatch.setattr(Fake, "calls", [])
    lists = ["--sizes", "64,128", "--pictures", "1,2", "--steps", "5,10", "--every", "1,2", "--rounds", "2", "--source", "mini"]
    return [*lists, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "curves.json")]


def test_a_run_that_was_stopped_measures_only_the_rest(small: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(KeyboardInterrupt):
        curves.main(small)
    measured = (tmp_path / "work" / "samples.jsonl").read_text().count('"cpu"')
    assert measured == 4
    curves.main(small)
    rows = json.loads((tmp_path / "curves.json").read_text())["rows"]
    found = {(row["curve"], row["at"]): (row["ratio"], row["peak_mb"]) for row in rows}
    assert found[("size", "128")] == (4.0, 100)
    assert found[("pictures", "2")] == (2.0, 200)
    assert found[("steps", "10")] == (2.0, 100)
    assert [at for curve, at in found if curve == "partition"] == ["block", "layer", "unit"]
    assert [call.plan for call in Fake.calls if call.steps == 10][-2:] == ["deepcache:2"] * 2
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(UserError, match="holds a run with other settings"):
        curves.main([*small, "--rounds", "3"])


@pytest.mark.parametrize(("option", "value"), [("--sizes", "256,x"), ("--every", "0,1"), ("--pictures", "4,2"), ("--steps", "")])
def test_lists_that_are_none_are_refused(option: str, value: str) -> None:
    with pytest.raises(UserError, match="is no rising list of whole numbers, such as 1,2,4"):
        curves.main([option, value])
