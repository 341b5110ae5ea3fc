"""The commands that stand beside the embedded models' smaller UNets are those that their settings tell of."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import tuning
from tuning import Experts
from tuning.__main__ import _parser
from tuning.distillation.options import DistillOptions

MINI = Path("models/mini/training")
PAGES = {"mini": MINI / "README.md", "emoji": Path("models/emoji/README.md")}
UNETS = sorted(path for model in PAGES for path in Path("models", model).glob("unet_*"))


def commands(page: Path) -> list[tuple[DistillOptions, int]]:
    """The distillations of a page, and in how many processes each ran."""
    found = []
    for line in re.findall(r"^ +(\S.* -m tuning distill.*)$", page.read_text().replace("\\\n", " "), re.M):
        before, _, after = line.partition(" -m tuning ")
        given = vars(_parser().parse_args(shlex.split(after)))
        options = DistillOptions.of({name: value for name, value in given.items() if name != "command"})
        found.append((options, int(before.split()[-1]) if "torchrun" in before else 1))
    return found


@pytest.mark.parametrize("folder", UNETS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_committed_unet_has_its_command(folder: Path) -> None:
    variant = folder.name.removeprefix("unet_")
    (made,) = [each for each in commands(PAGES[folder.parent.name]) if each[0].student == variant and each[0].steps != 300]
    check(*made, folder.parent / "training" / variant)


def test_every_variant_of_the_default_model_is_there() -> None:
    assert {folder.name for folder in UNETS if folder.parent.name == "emoji"} == {
        "unet_assembled",
        "unet_bk-tiny",
        "unet_condconv",
    }


def test_the_other_router_was_distilled_in_the_same_way() -> None:
    folder = MINI / "condconv-features"
    (made,) = [each for each in commands(PAGES["mini"]) if each[0].work == folder]
    check(*made, folder)
    recipe, plain = tuning.recipe(made[0].student), tuning.recipe("condconv")
    assert recipe == plain.model_copy(update={"name": recipe.name, "experts": Experts(router="features")})
    mine, other = (json.loads((path / "settings.json").read_text()) for path in (folder, MINI / "condconv"))
    assert {name for name in mine if mine[name] != other[name]} == {"student", "out", "work"}


def check(options: DistillOptions, processes: int, folder: Path) -> None:
    """The command gives the settings in the folder."""
    given: dict[str, Any] = options.model_dump(mode="json") | {"processes": processes}
    kept = json.loads((folder / "settings.json").read_text())
    assert {name: given[name] for name in kept} == kept
