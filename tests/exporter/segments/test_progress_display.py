"""The time left: an estimate by weights that does not depend on how often anything is told, on a terminal and in JSON."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exporter import BuildOptions, build
from exporter.segments.progress import Step, TimeLeft
from exporter.segments.progress_display import show_progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_time_left_goes_by_weights(clock: Clock) -> None:
    left = TimeLeft({"small": 1, "large": 3, "last": 2}, clock)
    clock.time += 5
    assert left.seconds() is None, "nothing is done yet"
    clock.time += 5
    left.finish("small")
    assert left.seconds() == 50
    clock.time += 20
    assert left.seconds() == 30, "time goes by while a segment is at work"
    clock.time += 16
    left.finish("large")
    assert left.seconds() == 23  # 46 seconds for four of six
    clock.time += 60
    assert left.seconds() == 0, "longer than expected"
    left.finish("last")
    assert left.seconds() == 0


def test_what_is_there_already_takes_no_time(clock: Clock) -> None:
    left = TimeLeft({"one": 1, "other": 1}, clock)
    left.finish("kept")
    assert left.seconds() is None
    clock.time += 30
    left.finish("one")
    assert left.seconds() == 30
    assert TimeLeft({}, clock).seconds() == 0


def test_a_slow_segment_shows_a_time_on_a_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Also long after the last step was told."""
    monkeypatch.setattr("exporter.segments.progress_display.time.monotonic", clock)
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=120)
    with show_progress(console, as_json=False) as progress:
        for seconds, shown in ((None, "left -:--:--"), (3725.0, "left 1:02:05")):
            progress(Step(1, 12, "up.1", "tracing", seconds))
            assert shown in _last_frame(console)
        clock.time += 65
        assert "left 1:01:00" in _last_frame(console)


def _last_frame(console: Console) -> str:
    (live,) = console._live_stack
    with console.capture() as captured:
        console.print(live.get_renderable())
    return captured.get()


@pytest.mark.parametrize("left", [None, 12.5])
def test_json_has_the_time_left(left: float | None) -> None:
    console = Console(file=StringIO())
    with show_progress(console, as_json=True) as progress:
        progress(Step(1, 12, "mid", "tracing", left))
    told = json.loads(console.file.getvalue())  # type: ignore[attr-defined]
    assert told.pop("seconds") >= 0
    assert told == {"done": 1, "total": 12, "segment": "mid", "phase": "tracing", "seconds_left": left}


def test_a_build_that_goes_on_counts_only_what_is_missing(fake_trace: Any, tiny_source: Path, tmp_path: Path) -> None:
    options = BuildOptions(source=str(tiny_source), out=tmp_path / "bundle")
    fake_trace(fail_at="up.0", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(options)
    fake_trace()
    steps: list[Step] = []
    build(options, steps.append)
    kept = [step for step in steps if step.phase == "kept"]
    assert [step.segment for step in kept][-1] == "mid"
    assert {step.seconds_left for step in kept} == {None}
    first = next(index for index, step in enumerate(steps) if step.segment == "up.1.layer.0")
    assert steps[first].seconds_left is not None
    assert steps[-1].seconds_left == 0
