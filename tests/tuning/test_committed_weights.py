"""The commands that stand beside the embedded model's smaller UNets are those that their settings tell of."""

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tuning.__main__ import _parser
from tuning.distill_options import fill_defaults

TRAINING = Path("models/mini/training")
PROCESSES = "torchrun --nproc-per-node 2 -m tuning distill"


def commands() -> list[argparse.Namespace]:
    text = (TRAINING / "README.md").read_text().replace("\\\n", " ")
    return [_parser().parse_args(shlex.split(line)[5:]) for line in re.findall(rf"^ +({PROCESSES}.*)$", text, re.M)]


@pytest.mark.parametrize("folder", sorted(Path("models/mini").glob("unet_*")), ids=lambda folder: folder.name)
def test_a_committed_unet_has_its_command(folder: Path) -> None:
    (options,) = [each for each in commands() if each.out == folder]
    fill_defaults(options)
    given: dict[str, Any] = json.loads(json.dumps(vars(options), default=str)) | {"processes": 2}
    kept = json.loads((TRAINING / folder.name.removeprefix("unet_") / "settings.json").read_text())
    assert {name: given[name] for name in kept} == kept
