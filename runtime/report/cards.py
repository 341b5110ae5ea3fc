"""Public figures of NVIDIA's cards: how fast their memory is read, and how fast they multiply.

From NVIDIA's architecture whitepapers and data sheets (docs/plans.md names them). Half precision is that of the tensor cores
without sparsity, added up in half precision where that is faster, as on GeForce cards: the most that a kernel can have.
"""

from dataclasses import dataclass

from engines.bundle.manifest import VaePrecision
from runtime.errors import RequestError

__all__ = ["CARDS", "Card", "find_card"]


@dataclass(frozen=True)
class Card:
    """One card: TensorRT-RTX's target, GB/s of memory, and TFLOPS in half precision on tensor cores and in single precision."""

    name: str
    target: str
    bandwidth: float
    half: float
    single: float

    def flops(self, precision: VaePrecision) -> float:
        """Operations in a second: two for each multiply-accumulate."""
        return 1e12 * (self.single if precision == "fp32" else self.half)


CARDS = (
    Card("rtx2080ti", "sm75", 616, 107.6, 13.4),
    Card("t4", "sm75", 320, 65, 8.1),
    Card("rtx3080", "sm86", 760, 119, 29.8),
    Card("rtx3090", "sm86", 936, 142, 35.6),
    Card("a10", "sm86", 600, 125, 31.2),
    Card("a100", "sm80", 1555, 312, 19.5),
    Card("rtx4070ti", "sm89", 504, 160.4, 40.1),
    Card("rtx4080", "sm89", 716.8, 194.9, 48.7),
    Card("rtx4090", "sm89", 1008, 330.3, 82.6),
    Card("l4", "sm89", 300, 121, 30.3),
    Card("l40s", "sm89", 864, 362, 91.6),
    Card("h100", "sm90", 3350, 989, 67),
    Card("rtx5080", "sm120", 960, 225.1, 56.3),
    Card("rtx5090", "sm120", 1792, 419, 104.8),
)


def find_card(name: str) -> Card:
    """The card of that name, however it is written: ``rtx4090``, ``RTX 4090``.

    Raises:
        RequestError: it is none of those known.
    """
    wanted = "".join(character for character in name.lower() if character.isalnum())
    for card in CARDS:
        if card.name == wanted:
            return card
    raise RequestError(f"unknown card {name!r}; choose one of {', '.join(card.name for card in CARDS)}")
