"""Reads a picture back: which concept it shows, in which style. Trained on the real pictures of training pairs only.

Its accuracy on real pictures that were held back is the ceiling of what generated ones can reach, and its pooled features are
what distances between sets of pictures are measured in. Input: (n, 3, 128, 128) pictures in [-1, 1]; it looks at them at half
size.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from engines.support.files import atomic_file, write_text
from tuning.errors import TuningError

__all__ = ["READER", "Reader", "load_reader", "right", "save_reader"]

READER = "training/reader"
"""Where in a model folder its reader lies."""
_CLASSES, _WEIGHTS = "classes.json", "reader.safetensors"


class _Block(nn.Module):
    """A residual block of two convolutions (He et al., arXiv 1512.03385) that may halve the size."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride) if stride > 1 or inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inside = functional.relu(self.norm1(self.conv1(x)))
        result: Tensor = functional.relu(self.shortcut(x) + self.norm2(self.conv2(inside)))
        return result


class Reader(nn.Module):
    """A small residual network with a pooled feature vector and two heads."""

    def __init__(self, concepts: int, styles: int, widths: tuple[int, ...] = (32, 64, 128, 192), features: int = 192) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        blocks = [_Block(a, b, 2) for a, b in zip((widths[0], *widths), widths, strict=False)]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], features))
        self.concept, self.style = nn.Linear(features, concepts), nn.Linear(features, styles)

    def features(self, pictures: Tensor) -> Tensor:
        """(n, 3, 128, 128) -> (n, features)."""
        result: Tensor = self.body(self.stem(functional.avg_pool2d(pictures, 2)))
        return result

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, 128, 128) -> scores of concepts (n, concepts) and of styles (n, styles)."""
        return self.read(functional.avg_pool2d(pictures, 2))

    def read(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, of pictures that are half as large already."""
        features = functional.relu(self.body(self.stem(views)))
        return self.concept(features), self.style(features)


@torch.no_grad()
def right(scores: Tensor, wanted: Tensor, top: int = 1) -> list[bool]:
    """Of each row whether its wanted class is among the `top` highest scores."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    answers: list[bool] = (best == wanted[:, None]).any(1).tolist()
    return answers


def save_reader(reader: Reader, concepts: Sequence[str], styles: Sequence[str], folder: Path) -> None:
    """Writes the weights in half precision, and the names of the classes last."""
    folder.mkdir(parents=True, exist_ok=True)
    state = reader.state_dict()
    half = {name: (value.half() if value.is_floating_point() else value).cpu().contiguous() for name, value in state.items()}
    with atomic_file(folder / _WEIGHTS) as temporary:
        save_file(half, temporary)
    write_text(folder / _CLASSES, json.dumps({"concepts": list(concepts), "styles": list(styles)}) + "\n")


def load_reader(folder: Path) -> tuple[Reader, list[str], list[str]]:
    """The reader in float32, in evaluation mode; names of its concepts and of its styles.

    Raises TuningError when there is none or it is damaged.
    """
    try:
        classes = json.loads((folder / _CLASSES).read_text())
        concepts, styles = list(classes["concepts"]), list(classes["styles"])
        state = {name: v.float() if v.is_floating_point() else v for name, v in load_file(folder / _WEIGHTS).items()}
        widths = [len(value) for name, value in sorted(state.items()) if name.endswith(".conv1.weight")]
        reader = Reader(len(concepts), len(styles), tuple(widths), state["concept.weight"].shape[1])
        reader.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise TuningError(f"{folder} holds no reader ({reason}): python -m tuning.emoji.train reader makes one") from error
    return reader.eval(), concepts, styles
