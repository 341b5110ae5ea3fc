"""Names and modules that are imported late are the ones that an import at once gives."""

import subprocess
import sys
from pathlib import Path

import pytest

import exporter
import runtime
from engines.lazy import postponed

ROOT = Path(__file__).parents[2]
OURS = "postponed_by_us"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that notes in ``sys`` that it was imported."""
    (tmp_path / OURS).mkdir()
    (tmp_path / OURS / "__init__.py").write_text("import sys\nsys.noted = True\ndef double(x): return 2 * x\nCONSTANT = 3\n")
    (tmp_path / OURS / "inner.py").write_text("VALUE = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "noted", False, raising=False)
    for name in (OURS, f"{OURS}.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return OURS


def noted() -> bool:
    return bool(vars(sys)["noted"])


def test_a_function_taken_from_a_postponed_module_imports_it_when_it_is_called(module: str) -> None:
    with postponed(module, "double"):
        double = __import__(module, fromlist=["double"]).double
    assert module not in sys.modules
    assert not noted()
    assert double(4) == 8
    assert noted()


def test_what_is_read_from_a_postponed_module_is_there(module: str) -> None:
    with postponed(module, "double"):
        assert __import__(module, fromlist=["CONSTANT"]).CONSTANT == 3
        assert noted()
        assert __import__(f"{module}.inner", fromlist=["VALUE"]).VALUE == 5
    assert sys.modules[module].CONSTANT == 3


def test_modules_that_are_imported_or_missing_stay_as_they_are() -> None:
    with postponed("json"), postponed("no_such_module"), postponed("no_such_package.module"):
        import json

        assert json is sys.modules["json"]
        with pytest.raises(ImportError):
            __import__("no_such_module")


def test_the_build_is_a_function_whatever_was_imported_before() -> None:
    code = "import exporter.build; from exporter import build; import exporter; assert build is exporter.build"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert callable(exporter.build)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(runtime, "nothing")  # noqa: B009 - the type checker knows better
    assert set(runtime.__all__) <= set(dir(runtime))
