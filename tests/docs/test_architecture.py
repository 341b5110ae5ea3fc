"""ARCHITECTURE.md names every module that there is and no other, and its table of diffusers' names is right."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from engines.bundle.names import BRANCH
from exporter.graph.topology import topology
from exporter.graph.unit_modules import paths_of

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
PACKAGES = ("engines", "exporter", "runtime", "serving", "tuning", "unet_heirloom", "benchmarks")


def section(title: str) -> str:
    """The text under a heading of ARCHITECTURE.md, up to the next heading of any level."""
    return re.split(r"^#+ ", TEXT.partition(f" {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def files(package: str) -> list[Path]:
    return [path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py")]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_listed_once_with_what_is_decided_there(package: str) -> None:
    listed = [name.strip("`") for name, _ in rows(package)]
    assert len(listed) == len(set(listed))
    there = {str(path) for path in files(package) if path.name != "__init__.py"}
    assert there - set(listed) == set(), "modules without a row"
    assert set(listed) - there == set(), "rows without a module"
    assert all(len(words) > 10 for _, words in rows(package))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_shows_every_room(package: str) -> None:
    tree = section("The tree")
    shown = re.split(rf"^{package}/", tree, flags=re.MULTILINE)[1]
    shown = re.split(r"^\w+/", shown, maxsplit=1, flags=re.MULTILINE)[0]
    rooms = {str(path.parent) for path in files(package)} - {"."}
    assert set(re.findall(r"^  (\w+)/ ", shown, flags=re.MULTILINE)) == rooms


def test_every_path_that_it_names_exists() -> None:
    named = re.findall(r"`((?:engines|exporter|runtime|tuning|benchmarks|models|docs)/[\w./-]*)`", TEXT)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_names_of_diffusers_are_those_of_stable_diffusion() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "models" / "sd15" / "unet"))
    units = {unit.name: unit for unit in topology(unet)}
    table = {ours.strip("`"): re.findall(r"`(.+?)`", theirs) for theirs, ours in rows("From diffusers' names to ours")}
    assert table == {name: list(paths_of(unet, name)) for name in table}
    assert set(table) <= set(units)
    form = {re.sub(r"\d", "N", name) for name in table}
    assert form == {re.sub(r"\d", "N", name) for name in units if not name.endswith(BRANCH)}
