"""`python -m tuning.emoji.train`: a model that draws emoji, and its reader, stage by stage, each for so many seconds.

Stages: `vae` (autoencoder, then whitened), `decoder` (its decoder alone), `unet` (UNet and text encoder on encoded drawings),
`reader` (needs none of the others). Written for a GPU and some minutes; on a CPU the same takes hours. A stage that was stopped
resumes from its checkpoint in OUT/checkpoints; more seconds train it longer. With --start it begins from another model.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engines.support.cli import Parser, quiet_libraries, run_command
from engines.support.files import write_text
from tuning.emoji.diffusion import train_unet
from tuning.emoji.pictures import Textures
from tuning.emoji.reader import READER
from tuning.emoji.reader_training import train_reader
from tuning.emoji.run import Log
from tuning.emoji.vae import train_decoder, train_vae
from tuning.errors import TuningError

__all__ = ["main"]

_STAGES = {"vae": train_vae, "decoder": train_decoder, "unet": train_unet, "reader": train_reader}
_SECONDS = {"vae": 60.0, "decoder": 60.0, "unet": 200.0, "reader": 60.0}
_BATCH = {"vae": 96, "decoder": 64, "unet": 512, "reader": 128}
_PARTS = ("unet", "text_encoder", "tokenizer", "vae", READER)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser(prog="python -m tuning.emoji.train", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=list(_STAGES))
    parser.add_argument("--icons", type=Path, default=Path("runs/emoji/icons"), help="the sets (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/model"), help="the model folder (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="a model folder to begin from, such as models/emoji")
    parser.add_argument("--seconds", type=float, help=f"training time of each stage (default: {_SECONDS})")
    parser.add_argument("--steps", type=int, help="steps of each stage, in place of seconds")
    parser.add_argument("--batch", type=int, help=f"batch size of each stage (default: {_BATCH})")
    parser.add_argument("--versions", type=int, default=16, help="drawings of a pair encoded at a time (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the UNet (default: %(default)s)")
    parser.add_argument("--concepts", type=int, help="train on only this many concepts, for trials")
    options = parser.parse_args(arguments)
    for name in ("seconds", "steps", "batch", "versions", "lr", "concepts"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise TuningError(f"--{name} {value} is not above 0; give a positive number")
    return options


def _begin(start: Path, out: Path) -> None:
    """Takes over the parts of a model that are not there yet. Raises TuningError where there is no model."""
    if not (start / "vae" / "config.json").is_file():
        raise TuningError(f"--start {start} is no model folder: it has no vae/config.json")
    for part in _PARTS:
        if (start / part).is_dir() and not (out / part).exists():
            shutil.copytree(start / part, out / part)


def _needed(stage: str, out: Path) -> None:
    """Raises TuningError when a stage lacks what another one makes."""
    if stage in ("decoder", "unet") and not (out / "vae" / "config.json").is_file():
        raise TuningError(f"{out / 'vae'} is missing: run the stage vae first, or give --start a model folder")


def main(arguments: Sequence[str]) -> None:
    """Runs the stages. Raises TuningError for a user's mistake."""
    options = _parse(arguments)
    quiet_libraries()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    if options.start:
        _begin(options.start, options.out)
    data = Textures(options.icons, device, options.concepts)
    for stage in options.stages:
        _needed(stage, options.out)
        seconds, batch = options.seconds or _SECONDS[stage], options.batch or _BATCH[stage]
        own: dict[str, Any] = {"versions": options.versions, "lr": options.lr} if stage == "unet" else {}
        settings = {"seconds": seconds, "steps": options.steps, "batch": batch, "device": str(device)} | own
        write_text(options.out / "training" / f"{stage}.settings.json", json.dumps(settings, indent=2) + "\n")
        log = Log(options.out / "training" / f"{stage}.jsonl", stage)
        log(**settings, pairs=len(data.train), held_back=len(data.held), concepts=len(data.concepts))
        _STAGES[stage](data, options.out, log, batch, seconds=seconds, steps=options.steps, **own)


if __name__ == "__main__":
    run_command(main)
