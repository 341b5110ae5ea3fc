"""The wheel, installed in a fresh environment and used in a folder that is not the repository's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

from engines import Bundle
from tests.support.sources import save_source

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engines", "exporter", "runtime", "serving", "tuning", "unet_heirloom")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "constraints.txt")

pytestmark = pytest.mark.slow


def run(words: list[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=alone, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as a build leaves files beside the sources that later imports would find."""
    copy = tmp_path_factory.mktemp("clone")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("emoji", "mini", "sd15", "sd21"):
        shutil.copytree(ROOT / "models" / name, copy / "models" / name)
    for name in FILES:
        shutil.copyfile(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)], copy)
    return next(out.glob("*.whl"))


def needed(names: Iterable[str]) -> set[str]:
    """Distributions that these need, themselves among them, without extras that nobody asked for."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
            continue
        if (name := canonicalize_name(wanted.name)) not in found:
            found.add(name)
            todo += [Requirement(line) for line in distribution(name).requires or ()]
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel in it and what it depends on, and nothing that only extras need."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    run([sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index", str(wheel)], folder)
    packages = next(folder.glob("lib*/python*/site-packages"))
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in needed(dependencies):
        for top in {path.parts[0] for path in distribution(name).files or () if path.parts[0] not in {"..", "__pycache__"}}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution(name).locate_file(top))  # type: ignore[arg-type]
    return folder / "bin"


def test_the_wheel_builds_and_draws_in_another_folder(installed: Path, tmp_path: Path) -> None:
    """With its dependencies and no others."""
    absent = "import importlib.util as i; print([name for name in ('scipy', 'matplotlib', 'ray', 'pytest') if i.find_spec(name)])"
    assert run([str(installed / "python"), "-c", absent], tmp_path).stdout == "[]\n"
    script = str(installed / "unet-heirloom")
    assert run([script, "--version"], tmp_path).stdout.startswith("unet-heirloom ")
    source = save_source(tmp_path / "tiny")
    done = run([script, "build", "--source", str(source), "--plan", "block:2", "--out", "tiny-bundle"], tmp_path)
    assert str(ROOT) not in done.stdout + done.stderr
    assert Bundle.open(tmp_path / "tiny-bundle").manifest.source == str(source)
    run(
        [script, "run", "a red star", "--bundle", "tiny-bundle", "--steps", "4", "--plan", "block:2", "--compare", "full"],
        tmp_path,
    )
    assert {"out.png", "out-compared.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "can run: " in run([script, "doctor"], tmp_path).stdout


def test_the_wheel_has_the_embedded_model_and_the_configurations_of_stable_diffusion(installed: Path, tmp_path: Path) -> None:
    """Whatever a build needs beside weights: it opens each source, and nothing of full size is made."""
    some = {f"model.diffusion_model.out.{number}.bias": torch.zeros(1280) for number in range(10)}
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(320, 768), **some}, tmp_path / "sd15.safetensors")
    code = """
import exporter, runtime, tuning, unet_heirloom
print(exporter.__file__, runtime.__file__, tuning.__file__, unet_heirloom.__file__)
from exporter.graph.checkpoint import open_source
from tuning.checkpoints.find_source import RANDOM_CONFIGS
variants = ("original", "assembled", "bk-tiny", "condconv")
for source, variant in [*((f"random:{name}", "original") for name in RANDOM_CONFIGS), ("sd15.safetensors", "original"),
                        *((model, name) for model in ("emoji", "mini") for name in variants)]:
    checkpoint = open_source(source, variant)
    print(checkpoint.folder, checkpoint.skeleton("unet", variant).config.cross_attention_dim)
"""
    lines = run([str(installed / "python"), "-c", code], tmp_path).stdout.splitlines()
    assert len(lines) > 10
    assert all(str(installed.parent) in line and str(ROOT) not in line for line in lines)
