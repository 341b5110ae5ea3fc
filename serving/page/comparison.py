"""A picture compared with the same in full: the figures of both as HTML, and where the two differ as a picture."""

import math
from html import escape

import numpy as np
from PIL import Image

from runtime.command.comparison import Comparison
from serving.page.calls import Made

__all__ = ["GAIN", "difference", "figures"]

GAIN = 8
"""By how much differences are made visible."""


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """By how much each pixel's colours differ, ``GAIN`` times as bright; black where they are alike."""
    apart = np.abs(np.asarray(one.convert("RGB"), np.int16) - np.asarray(other.convert("RGB"), np.int16))
    return Image.fromarray(np.minimum(apart * GAIN, 255).astype(np.uint8))


def figures(made: Made, macs: str, full: Made | None = None) -> str:
    """The figures of a call as HTML, with those of the same in full where it was made.

    Args:
        made: the call.
        macs: what its plan costs, such as ``42 %``.
        full: the same request with ``full``.
    """
    cards = [(f"{made.seconds:.2f} s", made.generation.plan.name), (macs, "of the UNet's MACs")]
    if full is not None:
        compared = Comparison(made.generation, full.generation)
        likeness = compared.psnr[0]
        cards = [
            (f"{compared.speedup:.1f}×", "as fast, by the UNet's steps"),
            cards[0],
            (f"{full.seconds:.2f} s", "full"),
            ("∞" if math.isinf(likeness) else f"{likeness:.0f} dB", "PSNR to full"),
            cards[1],
        ]
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(of)}</span></div>" for value, of in cards)
    return f'<div class="figures{" compared" if full else ""}">{shown}</div>'
