"""The arguments of ``python -m tuning plan``, and what of them can be refused before anything is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from engines.support.cli import Parser, parse_size
from engines.support.files import check_writable
from tuning.errors import TuningError

__all__ = ["PlanOptions", "add_arguments"]

_MOST_DB = 100.0
"""Nearer pictures count as equal."""


@dataclass(frozen=True)
class PlanOptions:
    """One search: bundles, how pictures are made, the aim of the plan (one of ``budget``, ``psnr`` and ``front``).

    Without a ``bundle`` it is the one in ``./bundles`` that was built last. ``budget`` is a share of the cost of ``full``;
    ``psnr`` is in dB; with ``judge_only`` the plans of a front are judged that are there; ``tries`` are plans of the local
    search; ``size`` is HEIGHTxWIDTH in pixels, None for the bundle's first; ``guidance_scale`` None is the bundle's.
    """

    bundle: tuple[Path, ...] = ()
    budget: float | None = None
    psnr: float | None = None
    front: bool = False
    judge_only: bool = False
    scheduler: str = "dpm++"
    steps: int = 20
    guidance_scale: float | None = None
    size: str | None = None
    engine: str = "onnxruntime"
    prompts: Path | None = None
    count: int = 16
    cost: str = "macs"
    tries: int = 120
    out: Path | None = None

    @property
    def path(self) -> Path:
        """Where the result is written: a .json file, or with ``front`` a folder."""
        return self.out or Path("plans" if self.front else "plan.json")

    @property
    def state(self) -> Path:
        """The file that keeps what was measured until the search is done."""
        return self.path.with_name(f"{self.path.name.removesuffix('.json')}.search.json")

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """The size in pixels, where one was asked for; raises UserError where it is none."""
        return None if self.size is None else parse_size(self.size)

    def check(self) -> None:
        """Refuse what is wrong whatever the bundle; nothing is written.

        Raises:
            UserError: an option is out of its range, or the result could not be written.
            OSError: the result could not be written.
        """
        self._check_wanted()
        if self.engine == "null":
            raise TuningError("--engine null: it computes nothing, so that all plans are alike; choose one that does")
        for name, least in (("steps", 2), ("count", 1), ("tries", 1)):
            if getattr(self, name) < least:
                why = "; one step has none before it to inherit from" if name == "steps" else ""
                raise TuningError(f"--{name} {getattr(self, name)}: must be {least} or more{why}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise TuningError(f"--guidance-scale {self.guidance_scale:g}: must be a number, such as 7.5")
        from runtime.images.schedulers import check_scheduler  # which --help does not wait for

        check_scheduler(self.scheduler)
        _ = self.height_and_width
        self._check_path()

    def _check_wanted(self) -> None:
        if sum((self.budget is not None, self.psnr is not None, self.front)) != 1:
            raise TuningError("say what the plan is to be: give one of --budget 0.5, --psnr 50 and --front")
        if self.judge_only and not self.front:
            raise TuningError("--judge-only goes with --front, whose plans it judges anew; leave it out to find a plan")
        if self.budget is not None and not 0 < self.budget < 1:
            raise TuningError(f"--budget {self.budget:g}: must be a share of the cost of full, above 0 and below 1, such as 0.5")
        if self.psnr is not None and not 0 < self.psnr <= _MOST_DB:
            raise TuningError(f"--psnr {self.psnr:g}: must be in dB, above 0 and up to {_MOST_DB:g}, such as 50")

    def _check_path(self) -> None:
        path = self.path
        if self.front and path.exists() and not path.is_dir():
            raise TuningError(f"--out {path} is a file; with --front choose a folder, for a plan file for each cost")
        if not self.front and (path.suffix != ".json" or path.is_dir()):
            raise TuningError(f"--out {path}: choose the name of a .json file, such as plan.json")
        check_writable(path if self.front else path.parent)


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of ``plan``."""
    add = parser.add_argument
    for option in ("--lora", "--vae"):
        parser.refuse(
            option, f"plans are searched with a built bundle: give {option} to build, and here the bundle that it makes"
        )
    add(
        "--bundle", type=Path, action="append", default=[],
        help="a bundle's folder (default: the one in ./bundles that was built last); twice for a plan that may begin with the "
        "smaller UNet of the two",
    )  # fmt: skip
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--budget", type=float, help="the nearest pictures at this share of the cost of full, such as 0.5")
    wanted.add_argument("--psnr", type=float, help="the cheapest plan whose pictures are that near to those of full, in dB")
    wanted.add_argument("--front", action="store_true", help="the nearest pictures at each of several costs, and a plot")
    add("--judge-only", action="store_true", help="with --front: judge the plans that the folder has anew, without a search")
    add("--scheduler", default="dpm++", help="ddim, pndm, dpm++, euler, heun, or another of diffusers (default: %(default)s)")
    add("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    add("--guidance-scale", type=float, help="of classifier-free guidance (default: the bundle's, 7.5 or less)")
    add("--size", help="HEIGHTxWIDTH in pixels (default: the bundle's first size)")
    add("--engine", default="onnxruntime", help="what runs the segments (default: %(default)s)")
    add("--prompts", type=Path, help="prompts, one a line; those beyond --count judge the plan (default: the embedded model's)")
    add("--count", type=int, default=16, help="prompts to find the plan with (default: %(default)s)")
    add(
        "--cost", choices=("macs", "seconds"), default="macs",
        help="what a step costs: its multiply-accumulates, or the time that it takes here (default: %(default)s)",
    )  # fmt: skip
    add("--tries", type=int, default=120, help="plans that the local search may try (default: %(default)s)")
    add("--out", type=Path, help="the plan file to write, or with --front a folder (default: plan.json, plans)")
