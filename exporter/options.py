"""Options of a build: which there are, which values they take, and what of them decides what a bundle holds."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from engines import ENGINES, Engine
from engines.bundle.folder import sha256
from engines.bundle.manifest import Precision, VaePrecision, Variant
from engines.support.spelling import did_you_mean
from exporter.errors import BuildError
from exporter.graph.partition import GRANULARITIES, Granularity
from runtime.embedded import DEFAULT
from runtime.plans.presets import find_plan
from tuning.loras.lora import Lora

__all__ = [
    "PRECISIONS",
    "VAE_PRECISIONS",
    "BuildOptions",
    "check_choices",
    "check_precision",
    "check_static",
    "targets_of",
    "versions",
]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
VAE_PRECISIONS: tuple[VaePrecision, ...] = ("fp32", "bf16", "fp16")
_VERSIONED = ("unet-heirloom", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


_MOST_CHUNKS = 64


@dataclass(frozen=True)
class BuildOptions:
    """The options of a build.

    Without a ``granularity``, segments are as large as ``plans`` allow. ``unet`` is the folder of the variant's UNet, where the
    source does not hold it; ``recipe`` the .json file by which it is made, where that is the user's; ``config`` the folder of
    configurations, where a source has none and is not SD 1.x/2.x; ``variant_files`` the variant of a folder's weight files, such
    as fp16; ``loras`` are fused into UNet and text encoder; ``vae`` replaces the source's. ``vae_precision`` is the VAE's, by
    default ``precision``. ``clip_skip`` of the text encoder's last layers are left out.
    ``sizes`` are (height, width) in pixels, none for the model's own; ``max_images`` is per call; ``static``
    engines take nothing less either. ``text_chunks`` is how many chunks of a prompt engines with a profile take. ``fresh`` builds
    take no pieces of other bundles. ``jobs`` processes work side by side.
    """

    variant: Variant = "original"
    source: str = DEFAULT
    unet: Path | None = None
    recipe: Path | None = None
    config: Path | None = None
    variant_files: str | None = None
    loras: tuple[Lora, ...] = ()
    vae: str | None = None
    engines: tuple[str, ...] = ("onnxruntime",)
    granularity: Granularity | None = "block"
    plans: tuple[str, ...] = ()
    precision: Precision = "fp32"
    vae_precision: VaePrecision | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    max_images: int = 4
    static: bool = False
    text_chunks: int = 1
    clip_skip: int = 0
    targets: tuple[str, ...] = ()
    out: Path | None = None
    force: bool = False
    fresh: bool = False
    jobs: int = 1

    @property
    def folder(self) -> Path:
        """Where the bundle goes: ``out``, or a name under ``bundles`` made from source and variant."""
        kind, _, name = self.source.rpartition(":")
        parts = (kind, Path(name).name.removesuffix(".safetensors").removesuffix(".json"), self.variant)
        return self.out or Path("bundles") / "-".join(re.sub(r"[^\w.]+", "-", part) for part in parts if part)

    @property
    def made_from(self) -> dict[str, object]:
        """The options that decide what the bundle holds, as JSON values."""
        options = asdict(self)
        for name in ("out", "force", "fresh", "jobs"):
            del options[name]
        options |= {name: None if options[name] is None else str(options[name]) for name in ("unet", "config", "recipe")}
        options["loras"] = [str(lora) for lora in self.loras]
        return options | {"plans": [sha256(Path(plan)) if Path(plan).is_file() else plan for plan in self.plans]}


def versions() -> dict[str, str]:
    """Versions of the programs that make a bundle."""
    return {name: version(name) for name in _VERSIONED}


def check_choices(options: BuildOptions) -> None:
    """Raise BuildError unless each option is one of those allowed, and PlanError for a plan that is none."""
    if options.granularity is None and not options.plans:
        raise BuildError("no granularity and no plan: name a plan to partition for, or a granularity")
    choices = (("granularity", GRANULARITIES), ("precision", PRECISIONS), ("vae_precision", VAE_PRECISIONS))
    for name, allowed in choices:
        given, what = getattr(options, name), name.replace("vae_", "VAE ")
        if given is not None and given not in allowed:
            raise BuildError(f"unknown {what} {given!r}; {did_you_mean(given, allowed)}choose from: {', '.join(allowed)}")
    if not options.engines:
        raise BuildError(f"no engine is named; choose from: {', '.join(ENGINES)}")
    for plan in options.plans:
        find_plan(plan)
    if options.jobs < 1:
        raise BuildError(f"jobs {options.jobs}: at least 1 process must do the work")
    if options.max_images < 1:
        raise BuildError(f"batch {options.max_images}: a bundle must take at least 1 image")
    if not 1 <= options.text_chunks <= _MOST_CHUNKS:
        raise BuildError(f"text chunks {options.text_chunks}: name from 1 to {_MOST_CHUNKS} that engines with a profile take")
    if options.clip_skip < 0:
        raise BuildError(f"clip skip {options.clip_skip}: name the number of the text encoder's last layers to leave out, from 0")


def check_precision(options: BuildOptions, engines: Sequence[Engine]) -> None:
    """Raise BuildError where an engine cannot compute in the VAE's precision."""
    unable = [engine.name for engine in engines if options.vae_precision == "bf16" and not engine.has_bfloat16]
    if unable:
        raise BuildError(
            f"VAE precision bf16: engine {', '.join(unable)} does not compute in it; "
            "choose --vae-precision fp32, or another --engine"
        )


def check_static(options: BuildOptions, engines: Sequence[Engine]) -> None:
    """Raise BuildError unless static engines are asked for one size and of an engine that has a profile."""
    if not options.static:
        return
    if len(options.sizes) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in options.sizes)
        raise BuildError(f"sizes {sizes}: static engines are built for one size; name one, or leave --static out")
    if options.text_chunks > 1:
        raise BuildError(
            f"text chunks {options.text_chunks}: static engines take one chunk of text; leave --text-chunks or --static out"
        )
    if not any(engine.has_profile for engine in engines):
        raise BuildError(
            f"static: engine {', '.join(options.engines)} is not built for given sizes; "
            "add tensorrt or tensorrt-rtx with --engine, or leave --static out"
        )


def targets_of(options: BuildOptions, engines: Sequence[Engine]) -> dict[str, tuple[str, ...]]:
    """The compute capabilities that each engine is to build for, by its name.

    Raises:
        BuildError: targets are named, but no engine takes any.
        EngineError: a target is unknown to its engine.
    """
    if options.targets and not any(engine.has_profile for engine in engines):
        raise BuildError(
            f"targets {', '.join(options.targets)}: engine {', '.join(options.engines)} takes none; leave --targets out"
        )
    return {engine.name: engine.check_targets(options.targets if engine.has_profile else ()) for engine in engines}
