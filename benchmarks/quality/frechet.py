"""Frechet distance between sets of pictures, in the feature space of the network reader.

Heusel et al. 2017 (arXiv 1706.08500) measure it in Inception's features, which know photographs; the embedded model's pictures
are told apart better by a network that was trained to read them. Figures compare with each other, not with published ones.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tuning.mini.data import batch
from tuning.mini.reader_network import load

__all__ = ["RENDERED", "distance_to", "rendered"]

RENDERED = 5000


class _Features(nn.Module):
    """Pictures (n, 3, 64, 64) in [-1, 1] -> (n, 128), as torchmetrics asks for features."""

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.reader = load()

    def forward(self, pictures: Tensor) -> Tensor:
        return self.reader.features(pictures)


def rendered(count: int, key: str, size: int = 250) -> Iterator[Tensor]:
    """`count` pictures (n, 3, 64, 64) in [-1, 1] of training scenes, drawn from `key`, `size` at a time."""
    for at in range(0, count, size):
        yield batch(min(size, count - at), f"{key} {at}")[2]


@torch.no_grad()
def distance_to(real: Iterator[Tensor], pictures: list[Tensor]) -> list[float]:
    """The Frechet distance of each set of pictures (n, 3, 64, 64) in [-1, 1] to the real ones."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(), reset_real_features=False)
    for part in real:
        metric.update(part, real=True)
    found = []
    for some in pictures:
        metric.reset()
        for part in some.split(250):
            metric.update(part, real=False)
        found.append(float(metric.compute()))
    return found
