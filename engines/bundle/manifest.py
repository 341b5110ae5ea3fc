"""The manifest: everything a bundle says about itself, as ``manifest.json`` in the bundle's folder.

A bundle is a folder with ONNX segments, compiled engines, a tokenizer and a scheduler configuration. The manifest names every
file with its SHA-256, every feature with dtype and symbolic shape, and every unit with its parameters and MACs, so that the
runtime needs neither the UNet's classes nor its weights in another form.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from shlex import quote
from typing import Annotated, Literal

from pydantic import Field, field_validator

from engines.bundle.names import OUTSIDE, VAE
from engines.bundle.shapes import Shape
from engines.support.records import Record

__all__ = [
    "MANIFEST_VERSION",
    "Compiled",
    "Feature",
    "File",
    "FusedLora",
    "Manifest",
    "Precision",
    "Segment",
    "Unit",
    "VaePrecision",
    "Variant",
    "is_variant",
]

MANIFEST_VERSION: Literal[1] = 1

Precision = Literal["fp32", "fp16"]
VaePrecision = Literal["fp32", "fp16", "bf16"]
"""bfloat16 has float32's range; it stays inside the VAE, whose inputs and outputs are float32."""
_VARIANT = r"^[a-z0-9]+(-[a-z0-9]+)*$"
Variant = Annotated[str, Field(pattern=_VARIANT)]
"""The name of the recipe by which the UNet was made: original, assembled, bk-tiny, ..."""
DType = Literal["float32", "float16", "int64"]
_BY_DEFAULT = "block"
"""The granularity of a build that is told nothing."""


def _is_nothing(value: object) -> bool:
    """Whether a field says no more than its absence."""
    return not value


def is_variant(name: str) -> bool:
    """Whether a variant can be called so."""
    return re.fullmatch(_VARIANT, name) is not None


class File(Record):
    """A file of the bundle: path relative to the bundle, SHA-256 in hexadecimal, size in bytes."""

    path: str
    sha256: str
    bytes: int

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        """A bundle may come from anybody: its files lie inside its folder."""
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"path {path!r} leads out of the bundle")
        return path


class Feature(Record):
    """A tensor between units: dtype and symbolic shape (see ``engines.bundle.shapes``)."""

    dtype: DType
    shape: Shape


class Unit(Record):
    """The smallest thing that can be skipped: a stem, ResNet, transformer, down- or upsampler, head, text encoder or VAE.

    Its output is the feature of the same name. ``macs`` are multiply-accumulates of one row at the bundle's first size; of
    these, ``macs_fixed`` are the same at every size (of the text and the time) and ``macs_quadratic`` grow with the area's square
    (of self-attention). The others grow with the area.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    parameters: int = 0
    macs: int = 0
    macs_fixed: int = 0
    macs_quadratic: int = 0

    def macs_at(self, area: float) -> float:
        """Multiply-accumulates of one row at so many times the area of the bundle's first size."""
        linear = self.macs - self.macs_fixed - self.macs_quadratic
        return self.macs_fixed + linear * area + self.macs_quadratic * area**2

    @property
    def outputs(self) -> tuple[str, ...]:
        """The one feature that the unit makes."""
        return (self.name,)


class Compiled(Record):
    """One segment compiled by one engine: the files, the engine's version, and the GPUs that they are for (empty: any).

    ``key`` is a hash of what it was made from.
    """

    files: tuple[File, ...]
    version: str
    targets: tuple[str, ...] = ()
    key: str = ""


class Segment(Record):
    """Units that run together: one ONNX file (first in ``onnx``; its weights follow) and one compiled engine per kind."""

    name: str
    units: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx: tuple[File, ...] = ()
    key: str = ""
    """Hash of what the ONNX file was made from."""
    engines: dict[str, Compiled] = Field(default_factory=dict)
    seconds: float = 0.0
    """How long it took to trace and compile; 0 where all of it was there already."""


class FusedLora(Record):
    """A LoRA that was fused into UNet and text encoder: its file where it was built, its SHA-256, and the factor."""

    file: str
    scale: float
    sha256: str

    @property
    def option(self) -> str:
        """As it is given to a build."""
        return f"{self.file}:{self.scale!r}"


class Manifest(Record):
    """All that a bundle knows. Segments stand in an order in which they can run."""

    version: Literal[1] = MANIFEST_VERSION
    key: str
    """Hash of everything the bundle was made from: an equal key means that a new build would make the same bundle."""
    variant: Variant
    source: str
    unet: str | None = Field(default=None, exclude_if=_is_nothing)
    """Folder of the UNet, where it is not one of the source's; not written where it is."""
    recipe: str | None = Field(default=None, exclude_if=_is_nothing)
    """The .json file of the recipe by which the UNet was made, if that was the user's; written if it was."""
    config: str | None = Field(default=None, exclude_if=_is_nothing)
    """Folder of configurations, if the source has none and was not SD 1.x/2.x; written if so."""
    variant_files: str | None = Field(default=None, exclude_if=_is_nothing)
    """Which variant of the source's weight files was asked for, such as fp16; written if one was."""
    vae: str | None = Field(default=None, exclude_if=_is_nothing)
    """The VAE, as it was given to the build, where it is not the source's; written where it is not."""
    loras: tuple[FusedLora, ...] = Field(default=(), exclude_if=_is_nothing)
    """LoRAs that were fused into the source's weights; written where there are any."""
    notes: tuple[str, ...] = Field(default=(), exclude_if=_is_nothing)
    """Remarks on how the weights were made, for a person to read; written where there are any."""
    source_sha256: str
    """Hash of the weights and configurations that the bundle was made from."""
    distilled: bool = True
    """Whether the UNet's weights were trained for it, not only cut out of the original's."""
    precision: Precision
    vae_precision: VaePrecision | None = Field(default=None, exclude_if=_is_nothing)
    """Of the VAE's segments, where it is not ``precision``; written where it is not."""
    sizes: tuple[tuple[int, int], ...]
    """Picture sizes (height, width) in pixels that engines with a profile were built for; the first is the default."""
    max_images: int
    """Images per call that engines with a profile were built for; guidance doubles the rows of a UNet call."""
    vae_images: int | None = Field(default=None, exclude_if=_is_nothing)
    """Pictures that the VAE's engines take at a time; None in bundles built before they took one: up to ``max_images``."""
    static: bool = Field(default=False, exclude_if=_is_nothing)
    """Whether engines with a profile take nothing but the first size and ``max_images`` images with guidance; written if so."""
    granularity: str | None = Field(default=_BY_DEFAULT, exclude_if=lambda given: given == _BY_DEFAULT)
    """The largest segment that was allowed; None where ``plans`` alone decided. Written where it is not the default."""
    plans: tuple[str, ...] = Field(default=(), exclude_if=_is_nothing)
    """Plans that the UNet is partitioned for beside the default ones: presets and .json files. Written where there are any."""
    latent_channels: int
    vae_scale: int
    """Pixels per latent, in each direction."""
    size_multiple: int
    """Picture height and width must be multiples of this many pixels."""
    guidance_scale: float = 7.5
    """Of classifier-free guidance, where a call does not say."""
    text_length: int
    """Tokens of a prompt, start and end included."""
    text_chunks: int = Field(default=1, exclude_if=lambda given: given == 1)
    """Chunks of ``text_length`` tokens that engines with a profile take of a prompt; others take any number, if the shape of the
    text's features says so. Written where there are more."""
    clip_skip: int = Field(default=0, exclude_if=_is_nothing)
    """How many of the text encoder's last layers are left out; written where any are."""
    vocabulary: int
    """Token numbers are below this."""
    features: dict[str, Feature]
    units: tuple[Unit, ...]
    segments: tuple[Segment, ...]
    files: tuple[File, ...]
    """Tokenizer and scheduler configuration."""
    made_with: dict[str, str]
    """Versions of the programs that made the bundle."""

    @property
    def unet_units(self) -> tuple[str, ...]:
        """Names of the UNet's units: those that a plan can name."""
        return tuple(unit.name for unit in self.units if unit.kind not in OUTSIDE)

    @property
    def unet_segments(self) -> tuple[Segment, ...]:
        """The segments of the UNet: all but the text encoder's and the VAE's."""
        units = set(self.unet_units)
        return tuple(segment for segment in self.segments if units.issuperset(segment.units))

    @property
    def all_files(self) -> Iterator[File]:
        """Every file of the bundle but the manifest."""
        for segment in self.segments:
            yield from segment.onnx
            for compiled in segment.engines.values():
                yield from compiled.files
        yield from self.files

    @property
    def is_random(self) -> bool:
        """Whether the weights are no model's, but random numbers, for measurements."""
        return self.source.startswith("random:")

    @property
    def build_command(self) -> str:
        """The command that builds from the same UNet, to be completed by what should differ."""
        options: dict[str, str | None] = {
            "unet": self.unet, "config": self.config, "variant-files": self.variant_files, "vae": self.vae,
            "clip-skip": str(self.clip_skip) if self.clip_skip else None,
        }  # fmt: skip
        if self.plans or self.granularity != _BY_DEFAULT:
            options["granularity"] = self.granularity
        given = [(name, value) for name, value in options.items() if value] + [("plan", plan) for plan in self.plans]
        given += [("lora", lora.option) for lora in self.loras]
        written = "".join(f" --{name} {quote(value)}" for name, value in given)
        variant = quote(self.recipe) if self.recipe else self.variant
        return f"python -m exporter build --variant {variant} --source {quote(self.source)}{written}"

    def whole_build_command(self, engine: str = "onnxruntime") -> str:
        """The command that builds the same in the default folder, for an engine beside those that it was built for."""
        names = sorted({engine, *(name for segment in self.segments for name in segment.engines)})
        sizes = ",".join(f"{height}x{width}" for height, width in self.sizes)
        batch = f"{self.max_images} --static" if self.static else f"1..{self.max_images}"
        precision = self.precision if self.vae_precision is None else f"{self.precision} --vae-precision {self.vae_precision}"
        options = f"--precision {precision} --engine {','.join(names)} --sizes {sizes} --batch {batch}"
        chunks = f" --text-chunks {self.text_chunks}" if self.text_chunks > 1 else ""
        return f"{self.build_command} {options}{chunks}"

    def precision_of(self, segment: Segment) -> VaePrecision:
        """The precision that a segment computes in: the VAE's may have a precision of their own."""
        return (self.vae_precision or self.precision) if VAE.issuperset(segment.units) else self.precision

    def segment(self, name: str) -> Segment:
        """The segment of that name; KeyError if there is none."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise KeyError(name)
