"""The hash of the code that decides what a bundle holds leaves out no file of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from engines import ENGINES
from exporter.job import CODE

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"engines", "exporter", "runtime", "tuning"}
HARMLESS = {
    # where files lie, how they are read and checked, and how a segment is run
    "engines/base.py",
    "engines/bundle/checks.py",
    "engines/bundle/damage.py",
    "engines/bundle/digests.py",
    "engines/bundle/folder.py",
    "engines/cuda/*.py",
    "engines/lazy.py",
    "engines/null.py",
    "engines/onnx_file.py",
    "engines/openvino/*.py",
    "engines/program.py",
    "engines/support/*.py",
    "engines/tensorrt/diagnostics.py",
    "engines/tensorrt/error_log.py",
    "engines/tensorrt/kernel_cache.py",
    "engines/tensorrt/kernels.py",
    "engines/tensorrt/runner.py",
    "engines/tensorrt/timing_cache.py",
    "engines/tensorrt/workspace.py",
    # which models there are by name
    "runtime/embedded.py",
    # which pieces are kept, in which order they are made and what is told of it
    "exporter/segments/artifacts.py",
    "exporter/segments/artifact_index.py",
    "exporter/segments/pool.py",
    "exporter/segments/progress.py",
}
"""Files that a build imports and that do not decide what the bundle holds."""


def imports_of(path: Path) -> Iterator[Path]:
    """The files of this project that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.partition(".")[0] in PACKAGES:
                found = ROOT / Path(*name.split("."))
                yield from (file for file in (found.with_suffix(".py"), found / "__init__.py") if file.is_file())


def closure(*first: Path) -> set[str]:
    """All files that are imported from these, and by those, and so on; packages' own files hold no code."""
    found, todo = set[Path](), list(first)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo.extend(imports_of(path))
    return {path.relative_to(ROOT).as_posix() for path in found if path.name not in {"__init__.py", "errors.py"}}


def files(*patterns: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}


def test_the_code_that_decides_is_what_a_build_imports() -> None:
    compilers = [ROOT / f"{ENGINES[name].partition(':')[0].replace('.', '/')}.py" for name in ENGINES]
    imported = closure(ROOT / "exporter" / "build.py", *compilers)
    decide = {pattern: files(f"{package}/{pattern}.py") for package, patterns in CODE.items() for pattern in patterns}
    decided = set().union(*decide.values())
    assert sorted(imported - decided - files(*HARMLESS)) == [], "decide for each whether it belongs to CODE or to HARMLESS"
    assert not decided & files(*HARMLESS)
    assert not [pattern for pattern, found in decide.items() if not found & imported], "no longer imported"
