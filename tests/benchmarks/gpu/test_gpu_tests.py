"""The tests that the check runs: which, and what it reads of how they ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.found import Found
from benchmarks.gpu.gpu_tests import DRILLS, REST, run_tests

TESTS = """
import pytest

@pytest.mark.gpu
def test_right():
    pass

@pytest.mark.gpu
@pytest.mark.skip(reason="needs two cards")
def test_left_out():
    pass

@pytest.mark.gpu
@pytest.mark.parametrize("x", [1, 2])
def test_some_of_which_are_wrong(x):
    assert x == 1, "not one"

@pytest.fixture
def broken():
    raise OSError("no card")

@pytest.mark.gpu
@pytest.mark.drill
def test_drill(broken):
    pass

def test_of_something_else():
    raise AssertionError("must not run")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  drill\n")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(TESTS)
    (tests / "test_broken.py").write_text("raise RuntimeError('of no card: must not be read')\n")
    return tests


def test_what_tests_say_is_read(folder: Path) -> None:
    tests = run_tests(REST, 60, folder)
    assert tests.passed == 2
    assert tests.skipped == {"tests.test_some.test_left_out": "needs two cards"}
    ((name, reason),) = tests.failed.items()
    assert name == "tests.test_some.test_some_of_which_are_wrong[2]"
    assert "not one" in reason
    assert tests.seconds >= 0
    assert Found(tests={REST: tests}).faults() == [f"{name}: {reason}"]


def test_drills_are_apart_and_an_error_before_a_test_is_a_fault(folder: Path) -> None:
    tests = run_tests(DRILLS, 60, folder)
    assert tests.passed == 0
    assert list(tests.failed) == ["tests.test_some.test_drill"]
    assert "no card" in tests.failed["tests.test_some.test_drill"]


def test_no_tests_are_no_success(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 5: no such tests"):
        run_tests("gpu and nothing", 60, folder)
    empty = tmp_path / "empty" / "tests"
    empty.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="no file below .* has a test marked gpu"):
        run_tests(REST, 60, empty)
