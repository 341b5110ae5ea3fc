"""What may be imported, by whom and without what; the public names; the pinned versions."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["engines", "exporter", "runtime", "serving", "tuning", "unet_heirloom"]

# Imported where they are used, so that nothing else needs them.
OPTIONAL = [
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "openvino",
    "polygraphy",
    "matplotlib",
    "scipy",
    "accelerate",
    "datasets",
    "DeepCache",
    "fastapi",
    "gradio",
    "prometheus_client",
    "ray",
    "uvicorn",
]
# Text encoder, VAE and UNet are segments of a bundle: generating needs nobody's model code, and nothing that builds.
MODEL_CODE = ["diffusers.models.unets", "diffusers.models.autoencoders", "transformers.models.clip.modeling_clip"]
# Which of our packages each may import. Nothing imports tests.
ALLOWED = {
    "engines": set(),
    "runtime": {"engines"},
    "tuning": {"engines", "runtime"},
    "exporter": {"engines", "runtime", "tuning"},
    "serving": {"engines", "runtime"},
    "unet_heirloom": {"engines", "runtime", "tuning", "exporter", "serving"},
    "benchmarks": {"engines", "runtime", "tuning", "exporter"},
}
MOST_FILES = 13
"""Python files in one folder of a package: more hide what lies there."""

# Arguments: modules to import, packages to hide. Prints JSON: {"failed": {module: error}, "loaded": [every module]}.
# Finders are wrapped rather than blocked by an exception, because libraries look for each other with find_spec().
IMPORT_ALL = """
import importlib, json, sys

modules, hidden = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
    del sys.modules[name]
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except BaseException as error:
        failed[module] = repr(error)
print(json.dumps({"failed": failed, "loaded": sorted(sys.modules)}))
"""


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def modules_of(package: str) -> list[str]:
    names = (path.relative_to(ROOT).with_suffix("").parts for path in files_of(package))
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def import_in_subprocess(modules: list[str], hidden: list[str]) -> tuple[dict[str, str], list[str]]:
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(modules), json.dumps(hidden)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return result["failed"], result["loaded"]


def is_under(module: str, parents: list[str]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def imported_names(path: Path) -> Iterator[str]:
    """Every module named by an import statement, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.slow
def test_every_module_imports_without_the_optional_packages() -> None:
    failed, loaded = import_in_subprocess([name for package in PACKAGES for name in modules_of(package)], OPTIONAL)
    assert not failed
    assert not [name for name in loaded if is_under(name, OPTIONAL)]


def test_runtime_and_engines_load_no_model_code_and_nothing_that_builds() -> None:
    modules = [name for package in ("engines", "runtime") if package in PACKAGES for name in modules_of(package)]
    failed, loaded = import_in_subprocess(modules, [])
    assert not failed
    assert not [name for name in loaded if is_under(name, [*MODEL_CODE, "exporter", "tuning"])]


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_lies_below_them(package: str) -> None:
    refused = sorted({*ALLOWED, "tests"} - ALLOWED[package] - {package})
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(package)
        for name in imported_names(path)
        if is_under(name, refused)
    ]
    assert not found


@cache
def ours() -> dict[str, Path]:
    """Every module of ours -> its file."""
    return {name: path for package in ALLOWED for name, path in zip(modules_of(package), files_of(package), strict=True)}


def room_of(module: str) -> str:
    """The folder of a package that a module lies in; a module at a package's root is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir() else module


def imports_between(node_of: Callable[[str], str]) -> dict[str, set[str]]:
    """Which nodes import which others; a name that is imported stands for the innermost module of ours that it lies in."""
    found: dict[str, set[str]] = {}
    for module, path in ours().items():
        for name in imported_names(path):
            while name and name not in ours():
                name = name.rpartition(".")[0]
            if name and node_of(name) != node_of(module):
                found.setdefault(node_of(module), set()).add(node_of(name))
    return found


@pytest.mark.parametrize("node_of", [room_of, str], ids=["rooms", "files"])
def test_no_circle_of_imports(node_of: Callable[[str], str]) -> None:
    found = imports_between(node_of)
    assert len(found) > len(ALLOWED), "imports are seen"
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' is imported by '.join(error.args[1])}")


def test_no_folder_hides_its_files_among_others() -> None:
    counts: dict[Path, int] = {}
    for path in ours().values():
        counts[path.parent] = counts.get(path.parent, 0) + 1
    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_rooms_are_two_levels_deep() -> None:
    assert [name for name in ours() if name.count(".") > 2] == []


@pytest.mark.parametrize("package", [name for name in PACKAGES if name in {"engines", "runtime"}])
def test_no_function_imports_model_code_later(package: str) -> None:
    classes = {"UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files_of(package)
        for name in imported_names(path)
        if is_under(name, MODEL_CODE) or name.rpartition(".")[2] in classes
    ]
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package: str) -> None:
    module = importlib.import_module(package)
    names = module.__all__
    assert names
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


def test_constraints_pin_every_direct_dependency_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    requirements = [Requirement(line) for line in [*project["dependencies"], *extras]]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    assert all(pins.values()), "every line of constraints.txt is NAME==VERSION"
    assert not [name for name, pin in pins.items() if "+" in pin], "a local version tag exists in one index only"
    # TensorRT's libraries fit the CUDA of the machine they run on: never pinned.
    direct = [need for need in requirements if normal(need.name) not in {"unet-heirloom", "tensorrt"}]
    bad = [str(need) for need in direct if pins.get(normal(need.name), "") not in need.specifier or not need.specifier]
    assert not bad


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
