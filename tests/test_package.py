"""The package unet_heirloom: all public names, each imported when it is used, and every command under one name."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unet_heirloom
from engines.support.environment import install_command
from tests.support.commands import assert_refused, command
from unet_heirloom.__main__ import COMMANDS
from unet_heirloom.doctor import _text, examine

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "diffusers", "transformers", "numpy", "pydantic", "rich", "onnx", "PIL"}
BARE = [sys.executable, "-I", "-S", "-c"]
"""A Python without any package: as of somebody who has installed nothing."""


def in_bare_python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    return subprocess.run([*BARE, code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_every_name_is_that_of_its_package() -> None:
    for name in set(unet_heirloom.__all__) - {"__version__"}:
        home = importlib.import_module(unet_heirloom._HOMES_OF.get(name, "runtime"))
        assert name in home.__all__
        assert getattr(unet_heirloom, name) is getattr(home, name)
    assert set(unet_heirloom.__all__) <= set(dir(unet_heirloom))
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = unet_heirloom.nonesuch


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert unet_heirloom.__version__ == project["version"]


def test_the_one_command_has_every_command_of_the_packages() -> None:
    asked = "build verify inspect run plans explain serve assemble distill rank plan bench doctor"
    assert set(asked.split()) <= set(COMMANDS)
    for each in COMMANDS.values():
        assert callable(importlib.import_module(each.module).main)


@pytest.mark.parametrize(("argument", "shown"), [("--help", "doctor"), ("--version", "unet-heirloom ")])
def test_help_and_version_import_nothing_heavy(argument: str, shown: str) -> None:
    code = "import atexit, json, sys; from unet_heirloom.__main__ import script; "
    code += "atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); script()"
    done = subprocess.run(
        [sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert not HEAVY & {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_help_of_the_commands_imports_no_library() -> None:
    code = """
import json, sys
from importlib import import_module
from contextlib import suppress
for package in ("exporter", "runtime", "serving", "tuning"):
    with suppress(SystemExit):
        import_module(f"{package}.__main__").main(["--help"])
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("usage: ") == 4
    assert not (HEAVY - {"pydantic"}) & {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("package", ["exporter", "runtime", "tuning"])
def test_every_command_tells_its_version(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(f"{package}.__main__").main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"unet-heirloom {unet_heirloom.__version__}\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["bild"], ["'bild'", "did you mean build?", "doctor"]),
        (["build", "--no-such"], ["--no-such", "see: unet-heirloom --help"]),
        (["run", "--no-such"], ["--no-such", "see: unet-heirloom run --help"]),
        (["rank", "--no-such"], ["--no-such", "see: unet-heirloom --help"]),
        (["bench", "no-such"], ["'no-such'", "variants"]),
        (["doctor", "--no-such"], ["--no-such", "--json"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_in_a_command(
    words: list[str], parts: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unet_heirloom.__main__ import script

    assert_refused(command(lambda given: script(), capfd, monkeypatch)(*words), *parts)


def test_without_the_repository_bench_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from unet_heirloom import bench

    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert_refused(command(bench.main, capfd, monkeypatch)("variants"), "no part of the installed package", "clone")


@pytest.mark.parametrize("package", ["engines", "exporter", "runtime", "tuning", "unet_heirloom"])
def test_the_types_are_for_others_too(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", ["exporter", "runtime", "tuning"])
def test_without_the_environment_a_command_says_so_in_one_line(package: str) -> None:
    code = f"sys.argv = ['-m', 'x']; import {package}"  # as `python -m` imports a command's package
    done = in_bare_python(code)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"error: {sys.executable} has no torch" in done.stderr
    assert done.stderr.endswith(f"{install_command()}\n")
    done = in_bare_python(f"import {package}")
    assert "ImportError: " in done.stderr
    assert "has no torch" in done.stderr


def test_without_the_environment_the_one_command_says_so() -> None:
    done = in_bare_python("sys.argv[1:] = ['build']; from unet_heirloom.__main__ import script; script()")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "has no torch" in done.stderr


def test_the_doctor_works_where_nothing_is_installed(tmp_path: Path) -> None:
    code = "sys.argv[1:] = ['doctor', '--json']; from unet_heirloom.__main__ import script; script()"
    done = in_bare_python(code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert "No module named 'torch'" in found["torch"]["error"]
    assert "has no torch" in found["engines"]["error"]
    assert "unet_heirloom doctor" in found["next"] or "pip install" in found["next"]


@pytest.mark.parametrize("width", [80, 50])
def test_the_doctor_writes_for_a_terminals_width(width: int, tmp_path: Path) -> None:
    found = examine(tmp_path)
    *lines, command = _text(found, width).splitlines()
    assert command == f"next          {found['next']}"
    words = " ".join(lines).split()
    assert all(word in words for value in ("torch", "tensorrt-rtx") for word in str(found["engines"][value]).split())
    assert [line for line in lines if len(line) > width and " " in line.strip()] == []


def test_the_doctor_lists_bundles_and_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(tmp_path)
    assert found["engines"]["onnxruntime"].startswith("can run: ")
    assert set(found["engines"]) >= {"openvino", "openvino-bf16", "torch", "tensorrt", "tensorrt-rtx"}
    assert found["bundles"] == {}
    assert found["next"] == "python -m exporter build --variant original"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    found = examine(tmp_path)
    assert found["bundles"][str(tmp_path / "broken")].startswith("damaged: ")
    assert found["next"] == "python -m exporter build --variant original"
    assert json.loads(json.dumps(found)) == found


def test_the_doctor_survives_an_engine_that_fails_oddly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import engines

    def fail(name: str) -> None:
        raise RuntimeError("libnvinfer.so.10: cannot open shared object file\nand more")

    monkeypatch.setattr(engines, "make_engine", fail)
    found = examine(tmp_path)
    assert set(found["engines"].values()) == {"cannot run: libnvinfer.so.10: cannot open shared object file and more"}
