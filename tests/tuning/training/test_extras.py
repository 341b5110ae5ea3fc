"""Where a package of the training extra is missing, the command says how to install it here, before it does anything."""

import importlib.util
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tuning import TuningError
from tuning.__main__ import main

INSTALL = 'pip install --constraint constraints.txt --editable ".[{}]"'


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("matplotlib", "rank --out {out}"),
        ("matplotlib", "distill --teacher mini --student assembled --data mini --steps 1 --out {out}"),
        ("scipy", "distill --teacher {model} --student assembled --data mini --steps 1 --out {out}"),
        ("datasets", "latents --source {model} --data {pictures} --out {out}"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    package: str, command: str, small_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: str) -> ModuleSpec | None:
        return None if name == package else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    out = tmp_path / "out"
    with pytest.raises(TuningError, match=f"needs {package}; install it") as caught:
        main(command.format(out=out, model=small_model, pictures=pictures).split())
    extra = "train" if package == "datasets" else "plots"
    assert str(caught.value).endswith(INSTALL.format(extra))
    assert not out.exists()
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith(package) for line in extras[extra])
    assert "unet-heirloom[plots]" in extras["train"]


@pytest.mark.parametrize(("page", "extra"), [("README.md", "train"), ("README.md", "plots"), ("docs/tuning.md", "train")])
def test_pages_show_that_command(page: str, extra: str) -> None:
    assert f"\n{INSTALL.format(extra)}" in Path(page).read_text()
