"""The part of the build that pyproject.toml cannot say: the models of the repository, put into the wheel beside their reader."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODELS = ("emoji", "mini", "sd15", "sd21")
"""The embedded models, and the configurations of the families. What was left of their training stays in the repository."""


def files() -> Iterator[Path]:
    """Every file of the models that the package needs, relative to the repository."""
    for name in MODELS:
        for path in sorted((ROOT / "models" / name).rglob("*")):
            inside = path.relative_to(ROOT / "models" / name)
            if path.is_file() and inside.parts[0] != "training":
                yield path.relative_to(ROOT)


class BuildWithModels(build_py):
    """Copies the models into ``tuning/models`` of what is built; an editable install reads those of the repository."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in files():
                target = Path(self.build_lib) / "tuning" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, target)


setup(cmdclass={"build_py": BuildWithModels})
