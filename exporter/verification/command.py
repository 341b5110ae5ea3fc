"""``python -m exporter verify``."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines import Bundle, make_engine
from exporter.verification.verify import (
    CHAIN,
    LARGEST_FP16,
    LEAST_COSINE,
    LEAST_PSNR,
    TOLERANCE,
    Comparison,
    Reference,
    compare_latents,
    verify,
)
from runtime.advice import wider_vae

__all__ = ["verify_command"]

FP16_STEPS = 20
"""Denoising steps after which latents are compared that are made in half precision or bfloat16: rounding adds up over them."""


def verify_command(folder: Path, engine: str, sizes: Sequence[tuple[int, int]], steps: int | None, console: Console) -> bool:
    """Verify a bundle, print the error of each segment, and say whether all are within what is allowed.

    Args:
        folder: the bundle.
        engine: the name of what runs its segments.
        sizes: see ``verify``.
        steps: denoising steps after which latents are compared; by default ``FP16_STEPS``, but none where the UNet runs in fp32.
        console: where to print.
    """
    bundle, runs = Bundle.open(folder), make_engine(engine)
    runs.check_device()
    bundle.check_complete()
    bundle.check()
    reference = Reference.load(bundle)
    found: list[Comparison] = []
    for comparison in verify(bundle, runs, sizes, reference):
        found.append(comparison)
        if comparison.segment == CHAIN:
            console.print(f"compared {_column(comparison)}", highlight=False)
    console.print(_table(found, f"{folder} on {engine}"))
    near = _say_errors(found, console)
    _say_overflows(found, bundle, engine, console)
    good = near and all(comparison.is_good for comparison in found)
    exact = (runs.computes_in or bundle.manifest.precision) == "fp32"
    steps = (0 if exact else FP16_STEPS) if steps is None else steps
    if steps:
        size = min(((c.height, c.width) for c in found), key=lambda size: size[0] * size[1])
        noise = compare_latents(bundle, runs, size, steps, reference)
        console.print(
            f"latents after {steps} DDIM steps at {size[0]}x{size[1]}: PSNR {noise:.1f} dB to torch float32 "
            f"(at least {LEAST_PSNR:g} wanted)",
            highlight=False,
            soft_wrap=True,
        )
        good = good and noise >= LEAST_PSNR
    return good


def _column(comparison: Comparison) -> str:
    return f"{comparison.images} x {comparison.height}x{comparison.width}"


def _table(found: Sequence[Comparison], what: str) -> Table:
    """A row for each segment: its error at each size, and how far its least cosine is from 1."""
    allowed = ", ".join(f"{precision} {TOLERANCE[precision]:g}" for precision in dict.fromkeys(c.precision for c in found))
    table = Table(title=f"{what}: error relative to torch float32 (allowed: {allowed})", box=SIMPLE)
    columns = dict.fromkeys(_column(comparison).replace(" x ", " x\n") for comparison in found)
    for column in ("segment", *columns, "1 -\ncosine"):
        table.add_column(column, justify="left" if column == "segment" else "right", no_wrap=True)
    for segment in dict.fromkeys(comparison.segment for comparison in found):
        row = [comparison for comparison in found if comparison.segment == segment]
        least, precision = min(comparison.cosine for comparison in row), row[0].precision
        cells = [(f"{c.error:.1e}", c.error <= TOLERANCE[precision]) for c in row]
        cells.append((f"{1 - least:.1e}", least >= LEAST_COSINE[precision]))
        table.add_row(segment, *(Text(text, "" if good else "red") for text, good in cells))
    return table


def _say_errors(found: Sequence[Comparison], console: Console) -> bool:
    """Say whether all is within what is allowed: for each precision that segments are in."""
    for precision in dict.fromkeys(comparison.precision for comparison in found):
        some = [comparison for comparison in found if comparison.precision == precision]
        worst, least = max(some, key=lambda c: c.error), min(some, key=lambda c: c.cosine)
        console.print(
            f"{'all within' if all(c.is_near for c in some) else 'NOT within'} {TOLERANCE[precision]:g} and "
            f"{1 - LEAST_COSINE[precision]:g} of a cosine of 1; the largest error is {worst.error:.1e} ({worst.segment}), "
            f"the least cosine 1 - {1 - least.cosine:.1e} ({least.segment})",
            highlight=False,
            soft_wrap=True,
        )
    return all(comparison.is_near for comparison in found)


def _say_overflows(found: Sequence[Comparison], bundle: Bundle, engine: str, console: Console) -> None:
    """Say which halves of the VAE make numbers that half precision has not, and what builds one that has them."""
    for segment in dict.fromkeys(comparison.segment for comparison in found if comparison.overflows):
        largest = max((c.peak for c in found if c.segment == segment and c.peak), key=lambda peak: peak.value)
        console.print(
            f"{segment} overflows in fp16: {largest.module} makes numbers up to {largest.value:,.0f}, and the largest of half "
            f"precision is {LARGEST_FP16:,.0f}; build the VAE wider: {wider_vae(bundle).rebuild_command(engine)}",
            highlight=False,
            soft_wrap=True,
        )
