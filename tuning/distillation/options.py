"""The arguments of `python -m tuning distill`, and what a run remembers of them."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from engines.support.files import write_text
from engines.support.records import Record
from tuning.errors import TuningError

if TYPE_CHECKING:
    from tuning.training.loop import LoopSettings

__all__ = ["DistillOptions", "add_arguments", "number", "remember"]

# `mini`'s data is small and plain: Muon and large steps suit it. Others start as in BK-SDM (arXiv 2305.15798).
_MINI = {"batch": 64, "lr": 1e-3, "muon_lr": 0.01, "warmup": 100, "decay": 0.9, "guidance": 3.0}
_OTHER = {"batch": 8, "lr": 5e-5, "muon_lr": 0.0, "warmup": 500, "decay": 0.0, "guidance": 7.5}
# A run that is resumed with others of these would be another run.
_SAME = (
    "teacher",
    "variant_files",
    "loras",
    "vae",
    "student",
    "data",
    "batch",
    "accumulate",
    "size",
    "dropout",
    "seed",
    "processes",
)
_LOOP = ("steps", "minutes", "wall_minutes", "lr", "muon_lr", "warmup", "decay", "clip", "ema", "seed", "accumulate")
_INTERVALS = ("log_every", "validate_minutes", "validate_every", "sample_every", "save_minutes")


class DistillOptions(Record):
    """One distillation: which UNets, which data, how long and how; the arguments of the command under their names."""

    model_config = ConfigDict(allow_inf_nan=False)

    teacher: str = Field(min_length=1)
    student: str = Field(min_length=1)
    data: str = Field(min_length=1)
    variant_files: str | None = None
    loras: tuple[str, ...] = ()
    vae: str | None = None
    out: Path
    work: Path | None = None
    steps: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    wall_minutes: float | None = Field(None, gt=0)
    pause_at: int | None = Field(None, ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    muon_lr: float = Field(ge=0)
    warmup: int = Field(ge=0)
    decay: float = Field(ge=0)
    guidance: float = Field(ge=0)
    ema: float = Field(0.999, ge=0)
    clip: float = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1)
    dropout: float = Field(0.1, ge=0)
    mixed: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    size: int | None = Field(None, ge=1)
    pool: int = Field(8192, ge=1)
    seed: int = Field(0, ge=0)
    log_every: int = Field(20, ge=1)
    validate_minutes: float = Field(6.0, ge=0)
    validate_every: int | None = Field(None, ge=1)
    validation: int = Field(512, ge=1)
    sample_every: int | None = Field(None, ge=1)
    prompts: Path | None = None
    save_minutes: float = Field(2.0, ge=0)
    precision: Literal["fp16", "fp32"] = "fp16"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "DistillOptions":
        """The options of these arguments; what is missing or None has its default, some of which depend on the data.

        Raises:
            TuningError: an argument is out of its range or none of ours, or no bound is given.
        """
        defaults = _MINI if given.get("data") == "mini" else _OTHER
        try:
            return cls.model_validate(defaults | {name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(own := first.get("ctx", {}).get("error"), TuningError):
                raise own from None
            name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
            raise TuningError(f"--{name}: {first['msg']}, got {first['input']!r:.80}") from error

    @model_validator(mode="after")
    def _shares_and_bound(self) -> "DistillOptions":
        for name in ("ema", "decay", "dropout"):
            if getattr(self, name) > 1:
                raise TuningError(f"--{name} {getattr(self, name)} is no share; give a number from 0 to 1")
        if not (self.steps or self.minutes or self.wall_minutes):
            raise TuningError("training needs a bound: give --steps, --minutes or --wall-minutes")
        return self

    @property
    def loop(self) -> "LoopSettings":
        """The settings of the training loop."""
        from tuning.training.loop import LoopSettings

        return LoopSettings(**{name: getattr(self, name) for name in (*_LOOP, *_INTERVALS)})


def number(kind: type, least: float) -> Callable[[str], Any]:
    """A reader of whole numbers (`int`) or numbers (`float`) from `least` on, for argparse."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {noun} of at least {least}")
        return value

    return read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `distill`."""
    whole, some, least = number(int, 1), number(float, 1e-9), number(float, 0)
    add = parser.add_argument
    add("--teacher", required=True, help="mini, a diffusers folder, a hub id, a .safetensors file, or random:CONFIG")
    add("--variant-files", help="which weight files of the teacher's folder or hub id, such as fp16 (default: those without)")
    add(
        "--lora", dest="loras", action="append", metavar="FILE[:SCALE]",
        help="a LoRA in the teacher, which the student learns with it; may be repeated",
    )  # fmt: skip
    add("--vae", help="a VAE in the place of the teacher's: a diffusers folder, a hub id, or a .safetensors file")
    add("--student", required=True, help="a recipe (name or .json), made of the teacher, or the folder of a UNet")
    add("--data", required=True, help="mini, a folder of pictures and metadata.jsonl, .tar shards, or latents (see latents)")
    add("--out", required=True, type=Path, help="folder for the student, in the diffusers layout")
    add("--work", type=Path, help="folder for metrics, curves, samples and the checkpoint (default: OUT/training)")
    bound = parser.add_argument_group("bounds (at least one; the first reached ends the run)")
    bound.add_argument("--steps", type=whole, help="optimizer steps")
    bound.add_argument("--minutes", type=some, help="CPU minutes of each process")
    bound.add_argument("--wall-minutes", type=some, help="minutes on the clock")
    bound.add_argument(
        "--pause-at",
        type=whole,
        help="stop for now at this step of each portion (or of the run); the same command without it resumes",
    )
    group = parser.add_argument_group("training (defaults for --data mini / for other data)")
    for name, kind, words in (
        ("batch", whole, "examples per process"),
        ("lr", some, "AdamW's learning rate"),
        ("muon_lr", least, "Muon's, for the inner matrices; 0: AdamW for all"),
        ("warmup", number(int, 0), "steps of rising learning rates"),
        ("decay", least, "last share of the bound in which they fall to 0"),
        ("guidance", least, "guidance scale of the sample pictures"),
    ):
        words += f" ({_MINI[name]} / {_OTHER[name]})"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=words)
    group.add_argument("--ema", type=least, default=0.999, help="decay of the weights' average (default: %(default)s)")
    group.add_argument("--clip", type=some, default=1.0, help="largest norm of the gradients (default: %(default)s)")
    group.add_argument("--accumulate", type=whole, default=1, help="batches per step (default: %(default)s)")
    group.add_argument("--dropout", type=least, default=0.1, help="share of captions left out (default: %(default)s)")
    group.add_argument("--mixed", choices=("no", "fp16", "bf16"), default="no", help="mixed precision, on a GPU")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--size", type=whole, help="pixels of the pictures' sides (default: the teacher's)")
    group.add_argument("--pool", type=whole, default=8192, help="--data mini: pictures rendered at a time (default: %(default)s)")
    group.add_argument("--seed", type=number(int, 0), default=0, help="seed of data order and noise (default: %(default)s)")
    look = parser.add_argument_group("monitoring")
    look.add_argument("--log-every", type=whole, default=20, help="steps between lines of the log (default: %(default)s)")
    look.add_argument("--validate-minutes", type=least, default=6.0, help="minutes between validations (default: %(default)s)")
    look.add_argument("--validate-every", type=whole, help="steps between validations, in place of minutes")
    look.add_argument(
        "--validation", type=whole, default=512, help="examples held back to validate, at most (default: %(default)s)"
    )
    look.add_argument("--sample-every", type=whole, help="steps between sample pictures (default: at every validation)")
    look.add_argument("--prompts", type=Path, help="prompts of sample pictures, one per line (default: some of the data's)")
    look.add_argument("--save-minutes", type=least, default=2.0, help="minutes between checkpoints (default: %(default)s)")
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="precision of the written student (default: %(default)s)")


def remember(options: DistillOptions, run: Path, processes: int, *, write: bool) -> None:
    """Writes the run's settings.json, after a look at the one that is there if the run is resumed.

    Raises TuningError when the run was started with another teacher, student, data or batch, or when its settings cannot be
    read.
    """
    path = run / "settings.json"
    values = options.model_dump(mode="json") | {"processes": processes}
    if path.exists() and next(run.rglob("checkpoint.pt"), None):
        before = {"loras": []} | _before(path)  # which runs of older versions do not name
        for name in _SAME:
            if before.get(name) != values.get(name):
                raise TuningError(
                    f"{run} holds a run with {name} {before.get(name)}, and this one has {values.get(name)}: give the same to "
                    f"resume it, another --work, or delete {run} to start anew"
                )
    if write:
        del values["pause_at"]
        write_text(path, json.dumps(values, indent=2) + "\n")


def _before(path: Path) -> dict[str, Any]:
    """The settings that the run was started with."""
    try:
        before = json.loads(path.read_text())
        if not isinstance(before, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise TuningError(
            f"{path} is damaged ({error}): delete it and give the same arguments to resume, or delete {path.parent} to start anew"
        ) from error
    return before
