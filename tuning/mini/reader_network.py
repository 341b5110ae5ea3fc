"""Reads a picture back with a small convolutional network trained on rendered pictures.

It shares nothing with the rule reader but the vocabulary, so that the two check each other; its pooled features are
what Frechet distances are measured in. Input: 64 x 64 pictures.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuning.mini.reader_rules import Seen, SeenObject
from tuning.mini.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene

__all__ = ["HEADS", "ReaderNetwork", "labels", "load", "read_batch", "save"]

WEIGHTS = Path(__file__).with_name("reader_network.safetensors")
SLOTS = 2  # objects, from left to right and from top to bottom
_NAMES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
# Head -> number of classes. The last class of every slot's colour means that there is no object.
HEADS: dict[str, int] = {"background": len(COLOURS)} | {
    f"{slot}.{name}": len(values) + (name == "colour") for slot in range(SLOTS) for name, values in _NAMES.items()
}
IGNORED = -100


class ReaderNetwork(nn.Module):
    """Five strided convolutions, a pooled feature vector of 128, and one linear head per attribute."""

    def __init__(self, widths: Sequence[int] = (24, 32, 64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        # Places must survive: what is left of the grid (2 x 2) is flattened, not averaged.
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name.replace(".", "_"): nn.Linear(128, n) for name, n in HEADS.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """(n, 3, 64, 64) in [-1, 1] -> (n, 128)."""
        features: Tensor = self.body(pictures)
        return features

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(n, 3, 64, 64) in [-1, 1] -> scores (n, classes) of every head."""
        features = self.features(pictures)
        return {name: self.heads[name.replace(".", "_")](features) for name in HEADS}


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers (n,) of every head; IGNORED where a slot is empty."""
    rows: dict[str, list[int]] = {name: [] for name in HEADS}
    for scene in scenes:
        rows["background"].append(_NAMES["colour"].index(scene.background))
        objects = sorted(scene.objects, key=lambda o: PLACES[o.place])
        for slot in range(SLOTS):
            obj = objects[slot] if slot < len(objects) else None
            for name, values in _NAMES.items():
                empty = len(values) if name == "colour" else IGNORED
                rows[f"{slot}.{name}"].append(empty if obj is None else values.index(getattr(obj, name)))
    return {name: torch.tensor(numbers) for name, numbers in rows.items()}


def save(network: ReaderNetwork, path: Path = WEIGHTS) -> None:
    """Writes the weights as fp16."""
    save_file({k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}, path)


@cache
def load(path: Path = WEIGHTS) -> ReaderNetwork:
    """The trained network in fp32, ready to read."""
    network = ReaderNetwork()
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return network.eval()


def _object(classes: dict[str, int], slot: int) -> SeenObject | None:
    if classes[f"{slot}.colour"] == len(COLOURS):
        return None
    names = {name: values[classes[f"{slot}.{name}"]] for name, values in _NAMES.items()}
    dx, dy = PLACES[names["place"]]
    x, y, extent = 0.5 + dx / 4, 0.5 + dy / 4, SIZES[names["size"]] / 64
    return SeenObject(names["colour"], names["shape"], names["size"], names["place"], x, y, extent)


@torch.no_grad()
def read_batch(pictures: Tensor, network: ReaderNetwork | None = None) -> list[Seen]:
    """Reads (n, 3, 64, 64) pictures in [-1, 1]."""
    scores = (network or load())(pictures)
    chosen = {name: values.argmax(1).tolist() for name, values in scores.items()}
    seen = []
    for i in range(len(pictures)):
        classes = {name: numbers[i] for name, numbers in chosen.items()}
        objects = [obj for slot in range(SLOTS) if (obj := _object(classes, slot)) is not None]
        seen.append(Seen(tuple(objects), _NAMES["colour"][classes["background"]]))
    return seen
