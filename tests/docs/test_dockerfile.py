"""The Dockerfile, which nothing here runs: hadolint, which the extra `test` brings for Linux on x86-64, and what can be read."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what stands behind it, continued lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in FILE.read_text().splitlines() if not line.startswith("#")))
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in text.splitlines() if line.strip())]


def test_both_images_stand_on_nvidias_at_one_version() -> None:
    bases = [rest for word, rest in instructions() if word == "FROM"]
    assert [re.fullmatch(r"(nvidia/cuda|nvcr\.io/nvidia/tritonserver):[\w.-]+ AS (\w+)", base)[2] for base in bases] == [  # type: ignore[index]
        "serve",
        "triton",
    ]


def test_what_it_names_exists() -> None:
    words = {word for word, _ in instructions()}
    assert words <= {"FROM", "SHELL", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    text = FILE.read_text()
    assert (ROOT / "constraints.txt").is_file()
    assert set(re.findall(r"\.\[(\w+)\]", text)) == {"serve"}
    from unet_heirloom.__main__ import COMMANDS

    assert set(re.findall(r'"unet-heirloom", "(\w+)"', text)) <= set(COMMANDS)


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(HADOLINT), str(FILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
