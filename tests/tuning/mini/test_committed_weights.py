"""The commands that stand beside the embedded model's smaller UNets are those that their settings tell of."""

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

TRAINING = Path("models/mini/training")
PROCESSES = "torchrun --nproc-per-node 2 -m tuning distill"


def commands() -> list[DistillOptions]:
    text = (TRAINING / "README.md").read_text().replace("\\\n", " ")
    found = [_parser().parse_args(shlex.split(line)[5:]) for line in re.findall(rf"^ +({PROCESSES}.*)$", text, re.M)]
    return [DistillOptions.of({name: value for name, value in vars(each).items() if name != "command"}) for each in found]


@pytest.mark.parametrize("folder", sorted(Path("models/mini").glob("unet_*")), ids=lambda folder: folder.name)
def test_a_committed_unet_has_its_command(folder: Path) -> None:
    (options,) = [each for each in commands() if each.out == folder]
    check(options, TRAINING / folder.name.removeprefix("unet_"))


def test_the_other_router_was_distilled_in_the_same_way() -> None:
    folder = TRAINING / "condconv-features"
    (options,) = [each for each in commands() if each.work == folder]
    check(options, folder)
    recipe, plain = tuning.recipe(options.student), tuning.recipe("condconv")
    assert recipe == plain.model_copy(update={"name": recipe.name, "experts": Experts(router="features")})
    mine, other = (json.loads((path / "settings.json").read_text()) for path in (folder, TRAINING / "condconv"))
    assert {name for name in mine if mine[name] != other[name]} == {"student", "out", "work"}


def check(options: DistillOptions, folder: Path) -> None:
    """The command gives the settings in the folder."""
    given: dict[str, Any] = options.model_dump(mode="json") | {"processes": 2}
    kept = json.loads((folder / "settings.json").read_text())
    assert {name: given[name] for name in kept} == kept
