"""The wheel, installed in a fresh environment and used in a folder that is not the repository's."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines import Bundle
from tests.support.sources import save_source

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engines", "exporter", "runtime", "serving", "tuning", "unet_heirloom")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "constraints.txt")

pytestmark = pytest.mark.slow


def run(words: list[str], cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as a build leaves files beside the sources that later imports would find."""
    copy = tmp_path_factory.mktemp("clone")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mini", "sd15", "sd21"):
        shutil.copytree(ROOT / "models" / name, copy / "models" / name)
    for name in FILES:
        shutil.copyfile(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)], copy)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel in it, and what it depends on where this one has it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    run([sys.executable, "-m", "pip", "--python", str(folder), "install", "--no-deps", "--no-index", str(wheel)], folder)
    packages = next(folder.glob("lib*/python*/site-packages"))
    # Plain path entries: the .pth files in there, that of our own editable install among them, are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def test_the_wheel_builds_in_another_folder(installed: Path, tmp_path: Path) -> None:
    script = str(installed / "unet-heirloom")
    assert run([script, "--version"], tmp_path).stdout.startswith("unet-heirloom ")
    source = save_source(tmp_path / "tiny")
    done = run([script, "build", "--source", str(source), "--out", "tiny-bundle"], tmp_path)
    assert str(ROOT) not in done.stdout + done.stderr
    assert Bundle.open(tmp_path / "tiny-bundle").manifest.source == str(source)


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
for source, variant in [*((f"random:{name}", "original") for name in RANDOM_CONFIGS), ("sd15.safetensors", "original"),
                        *(("mini", name) for name in ("original", "assembled", "bk-tiny", "condconv"))]:
    checkpoint = open_source(source, variant)
    print(checkpoint.folder, checkpoint.skeleton("unet", variant).config.cross_attention_dim)
"""
    lines = run([str(installed / "python"), "-c", code], tmp_path).stdout.splitlines()
    assert len(lines) > 10
    assert all(str(installed.parent) in line and str(ROOT) not in line for line in lines)
