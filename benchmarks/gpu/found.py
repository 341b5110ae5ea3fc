"""Findings of the GPU check, and the faults among them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from engines.bundle.manifest import VaePrecision
from exporter.verification.verify import LEAST_COSINE, LEAST_PSNR, TOLERANCE

__all__ = ["Fit", "Found", "Memory", "PytestResult", "Row", "TextAndVae"]

PLANNED = 0.1
"""How far, relative to what is planned, the memory of features may be off."""


@dataclass(frozen=True)
class Row:
    """A plan on an engine. Errors are the largest, relative to the largest value; None where there is nothing to measure."""

    engine: str
    precision: str
    plan: str
    error: float | None
    """Of the final latents, run segment by segment, against the reference; None of the reference itself."""
    graphs_error: float | None
    """Of the final latents with steps replayed, against the same segment by segment."""
    milliseconds: float
    """Of a picture's UNet steps, segment by segment; the median of the rounds."""
    graphs_milliseconds: float | None
    planned_bytes: int
    """Of features at once, between segments; compared with the next."""
    features_bytes: int | None
    """Of features at once, as PyTorch's allocator has them after every segment."""
    peak_bytes: int | None
    """As it has them at any time: what PyTorch itself needs inside a segment is in it, but no other library's own memory."""
    first_seconds: float | None = None
    """Of the plan's first call, segment by segment: whatever is made at first use is made in it."""
    graphs_first_seconds: float | None = None
    """Of its first call with graphs: every kind of step is recorded in it."""
    picture_seconds: float | None = None
    """Of a picture from prompt to pixels, as the host sees it, with graphs where there are any; the median of the rounds."""
    device_bytes: int | None = None
    """Free memory of the whole device before the engine less that after the plan, as its driver reports both."""
    reference: str | None = None
    """The engine and the precision of the latents that its own are compared with."""

    @property
    def name(self) -> str:
        """The engine, the precision and the plan, in words."""
        return f"{self.engine} {self.precision} {self.plan}"


@dataclass(frozen=True)
class Fit:
    """How near a segment comes to the diffusers model: the largest error, relative to the largest value, and the least cosine."""

    error: float
    cosine: float


@dataclass(frozen=True)
class TextAndVae:
    """Times of the text encoder and the VAE decoder; and how many kernels one full step of the UNet is."""

    text_milliseconds: float
    vae_milliseconds: float
    kernels: int | None


@dataclass(frozen=True)
class Memory:
    """An engine's memory beside features; compared with nothing."""

    weights_bytes: int
    """Of the UNet's files."""
    scratch_bytes: int
    """Scratch memory for each stream, as the engine states it; 0 where it does not."""
    device_bytes: int | None
    """Free memory of the whole device at the beginning less that at the end, by its driver: with all that libraries keep."""


@dataclass(frozen=True)
class PytestResult:
    """Tests that were run on the card."""

    passed: int
    skipped: Mapping[str, str]
    """Why, by the test's name."""
    failed: Mapping[str, str]
    """The first line of what was wrong, by the test's name."""
    seconds: float


@dataclass
class Found:
    """Findings of a stage of the check, by engine and precision."""

    rows: list[Row] = field(default_factory=list)
    segments: dict[str, dict[str, Fit]] = field(default_factory=dict)
    psnr: dict[str, float] = field(default_factory=dict)
    """Of half precision's latents, in decibels."""
    ends: dict[str, TextAndVae] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    starts: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds of a second process, which finds what the first one has compiled."""
    baselines: list[Mapping[str, Any]] = field(default_factory=list)
    """Diffusers' own pipeline on the same card."""
    tests: dict[str, PytestResult] = field(default_factory=dict)
    """By the marks that chose them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that each part took."""
    build_seconds: dict[str, float] = field(default_factory=dict)
    cards: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """The card's clocks, temperature, power and load when a part had ended."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why an engine could not be had, or what there was no time for."""
    ended: dict[str, str] = field(default_factory=dict)
    """How an engine broke off in the middle."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Found":
        """What was written; raises TypeError or KeyError for what another version of the check has written."""
        names = {one.name for one in fields(cls)}
        given = {name: value for name, value in values.items() if name in names}
        given["rows"] = [Row(**row) for row in given["rows"]]
        for name, kind in (("ends", TextAndVae), ("memory", Memory), ("tests", PytestResult)):
            given[name] = {key: kind(**value) for key, value in given[name].items()}
        given["segments"] = {
            key: {segment: Fit(**fit) for segment, fit in fits.items()} for key, fits in given["segments"].items()
        }
        return cls(**given)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.rows or self.segments or self.starts or self.baselines or self.tests)

    def beside(self, earlier: "Found") -> "Found":
        """These findings, and those of an earlier run of which there are no newer ones."""
        done = {*self.seconds, *self.skipped}
        names = {row.name for row in self.rows}
        ways = {way["name"] for way in self.baselines}
        merged = Found(
            rows=[row for row in earlier.rows if row.name not in names] + self.rows,
            baselines=[way for way in earlier.baselines if way["name"] not in ways] + self.baselines,
        )
        for one in fields(self):
            old, new = getattr(earlier, one.name), getattr(self, one.name)
            if one.name in {"ended", "skipped"}:  # what was tried again has ended as it has now
                old = {name: reason for name, reason in old.items() if name not in done}
            if isinstance(new, dict):
                setattr(merged, one.name, old | new)
        return merged

    def faults(self) -> list[str]:
        """List what fails the check. Errors of final latents depend on the plan and the model, and are only reported."""
        faults = [f"{name}: broke off: {reason}" for name, reason in self.ended.items()]
        faults += [f"{name}: {reason}" for tests in self.tests.values() for name, reason in tests.failed.items()]
        for name, fits in self.segments.items():
            precision: VaePrecision = "fp16" if name.endswith("fp16") else "fp32"
            for segment, fit in fits.items():
                if not (fit.error <= TOLERANCE[precision] and fit.cosine >= LEAST_COSINE[precision]):
                    faults.append(f"{name}: segment {segment} is off by {fit.error:.1e}, its cosine by {1 - fit.cosine:.1e}")
        for name, psnr in self.psnr.items():
            if not psnr >= LEAST_PSNR:
                faults.append(f"{name}: latents have a PSNR of {psnr:.1f} dB, not {LEAST_PSNR:g}")
        # Replayed or not, the same kernels run; only what picks another kernel inside a graph can make a difference.
        off = [row for row in self.rows if row.graphs_error is not None and not row.graphs_error <= 1e-3]
        faults += [f"{row.name}: replayed steps are off by {row.graphs_error:.1e}" for row in off]
        return faults + [
            f"{row.name}: features of {row.planned_bytes} bytes are planned, {row.features_bytes} held"
            for row in self.rows
            if row.features_bytes is not None and abs(row.features_bytes - row.planned_bytes) > PLANNED * row.planned_bytes
        ]
