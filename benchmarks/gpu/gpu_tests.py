"""The tests marked ``gpu``, run in a process of their own, and what they say."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from benchmarks.gpu.found import PytestResult

__all__ = ["DRILLS", "REST", "run_tests"]

DRILLS = "gpu and drill"
REST = "gpu and not drill"
_ROOT = Path(__file__).resolve().parents[2]
_RAN = {0, 1}
"""Exit codes of pytest where tests ran, whether they passed or not."""


def run_tests(marks: str, seconds: float, folder: Path = _ROOT / "tests") -> PytestResult:
    """Run the tests that the marks choose.

    Args:
        marks: as pytest's ``-m`` takes them.
        seconds: how long they may take.
        folder: where tests are looked for; files that name no such mark are not even read by pytest.

    Raises:
        RuntimeError: none were found, or pytest could not run them.
        subprocess.TimeoutExpired: they took too long.
    """
    files = sorted(str(path) for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    if not files:
        raise RuntimeError(f"no file below {folder} has a test marked gpu")
    with TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", marks, f"--junitxml={report}", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=folder.parent, timeout=seconds, check=False)
        if done.returncode not in _RAN:
            raise RuntimeError(f"pytest -m '{marks}' ended with {done.returncode}: no such tests, or not run to their end")
        return _read(report)


def _read(report: Path) -> PytestResult:
    """The tests of a report in JUnit's form."""
    passed, skipped, failed, seconds = 0, dict[str, str](), dict[str, str](), 0.0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name, seconds = f"{case.get('classname')}.{case.get('name')}", seconds + float(case.get("time", 0))
        wrong = [part for part in case if part.tag in {"failure", "error"}]
        if wrong:
            failed[name] = (wrong[0].get("message") or wrong[0].tag).splitlines()[0][:300]
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message") or "skipped"
        else:
            passed += 1
    return PytestResult(passed, skipped, failed, round(seconds, 1))
