"""One request with two plans: how much faster one is, how like its pictures are, and both on one sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from engines.support.files import atomic_file
from runtime.generation import Generation
from runtime.images.pictures import picture_psnr
from runtime.plans.schedule import Schedule
from runtime.report.explain import COLOURS, unit_states
from runtime.report.kinds import kinds_of

__all__ = ["Comparison", "draw"]


@dataclass(frozen=True)
class Comparison:
    """A call, and the same with another plan."""

    made: Generation
    other: Generation

    @property
    def speedup(self) -> float:
        """How many times as fast the UNet's steps are as the other's: each kind of step counts by its median time."""
        ours, theirs = (sum(kind.count * kind.milliseconds for kind in kinds_of(each.steps)) for each in (self.made, self.other))
        return theirs / ours if ours else math.inf

    @property
    def psnr(self) -> list[float]:
        """Of each picture, the peak signal-to-noise ratio in dB against the other's, in 8 bits; infinite where they are alike."""
        return [picture_psnr(one, other) for one, other in zip(self.made.images, self.other.images, strict=True)]

    def __str__(self) -> str:
        least, most = min(self.psnr), max(self.psnr)
        like = (
            "the same pictures"
            if least == math.inf
            else f"{least:.0f} dB"
            if len(self.psnr) == 1
            else f"{least:.0f} to {most:.0f} dB"
        )
        like = "the same picture" if least == math.inf and len(self.psnr) == 1 else like
        return f"{self.made.plan.name}: {self.speedup:.1f} times as fast as {self.other.plan.name}, {like}"

    def as_json(self) -> dict[str, Any]:
        """The figures in JSON's terms; null where pictures are alike."""
        likeness = [None if math.isinf(value) else round(value, 2) for value in self.psnr]
        return {"plan": self.other.plan.name, "speedup": round(self.speedup, 3), "psnr": likeness}


_SIDE, _GAP, _TEXT, _ROW = 384, 16, 16, 6
_INK, _PAPER = "#222222", "#ffffff"


def draw(compared: Comparison, schedule: Schedule, path: Path) -> None:
    """Write a PNG: the first picture of both calls, enlarged, and under them what the plan computes, steps across, units down."""
    pictures = [_enlarged(each.images[0]) for each in (compared.other, compared.made)]
    names, rows = unit_states(schedule)
    width = sum(picture.width for picture in pictures) + 3 * _GAP
    top = 3 * _TEXT + max(picture.height for picture in pictures) + _GAP
    sheet = Image.new("RGB", (width, top + 2 * _TEXT + _ROW * len(names) + 4 * _TEXT), _PAPER)
    pen, left = ImageDraw.Draw(sheet), _GAP
    titles = f"plan {compared.other.plan.name}", f"plan {compared.made.plan.name}"
    for picture, title in zip(pictures, titles, strict=True):
        pen.text((left, _TEXT), title, _INK, _font(_TEXT))
        sheet.paste(picture, (left, 3 * _TEXT))
        left += picture.width + _GAP
    pen.text((_GAP, top), str(compared), _INK, _font(_TEXT))
    _draw_strip(pen, rows, top + 2 * _TEXT, width)
    _draw_legend(pen, {state for row in rows for state in row}, top + 2 * _TEXT + _ROW * len(names) + _TEXT // 2, len(rows[0]))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, round(_SIDE / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def _draw_strip(pen: ImageDraw.ImageDraw, rows: Sequence[Sequence[int]], top: int, width: int) -> None:
    """A cell for each unit and step, from the stem above to the head below."""
    colours, cell = list(COLOURS.values()), (width - 2 * _GAP) / len(rows[0])
    for number, row in enumerate(rows):
        for step, state in enumerate(row):
            left, right = (_GAP + round(at * cell) for at in (step, step + 1))
            pen.rectangle((left, top + number * _ROW, right - 2, top + (number + 1) * _ROW - 2), colours[state])


def _draw_legend(pen: ImageDraw.ImageDraw, states: set[int], top: int, steps: int) -> None:
    pen.text((_GAP, top), f"steps 0 to {steps - 1} across, the UNet's units from stem to head down", _INK, _font(_TEXT - 3))
    left = _GAP
    for state, (name, colour) in enumerate(COLOURS.items()):
        if state in states:
            pen.rectangle((left, top + _TEXT + 6, left + 12, top + _TEXT + 18), colour, "#999999")
            pen.text((left + 18, top + _TEXT + 4), name, _INK, _font(_TEXT - 3))
            left += 40 + int(pen.textlength(name, _font(_TEXT - 3)))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
